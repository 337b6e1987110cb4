"""What can go wrong with a server.

ServerError
├── ServerUnavailable   this machine cannot have the server; its sentence says what to do (a test skips)
└── StartFailed         it should have started and did not; the tail of its log is part of the message
"""


class ServerError(Exception):
    """Base of all errors of this package."""


class ServerUnavailable(ServerError):  # noqa: N818 # says what it is
    """There is no way to have this server on this machine; the message names the ways that were looked for."""


class StartFailed(ServerError):  # noqa: N818 # says what happened
    """The server was started and did not become usable, or something else answers in its place."""

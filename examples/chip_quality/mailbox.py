"""A mail server of the demo's and the tests' own: it keeps what it was given, by idempotency key."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes
from typing import Any

from aiosmtpd.controller import Controller

from tests.servers.process import free_port


class Mailbox:
    """The handler of an aiosmtpd server."""

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()
        """How often a mail with this Idempotency-Key came."""
        self.recipients: dict[str, list[str]] = {}
        """To whom, by the same."""
        self.address = ""

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 -- aiosmtpd's name
        """A mail came."""
        key = str(message_from_bytes(envelope.content)["Idempotency-Key"])
        self.received[key] += 1
        self.recipients[key] = list(envelope.rcpt_tos)
        return "250 OK"


@contextmanager
def mail_server() -> Iterator[Mailbox]:
    """A server on 127.0.0.1 for the length of the block, in a thread."""
    mailbox = Mailbox()
    port = free_port()
    controller = Controller(mailbox, hostname="127.0.0.1", port=port)
    controller.start()
    mailbox.address = f"127.0.0.1:{port}"
    try:
        yield mailbox
    finally:
        controller.stop()

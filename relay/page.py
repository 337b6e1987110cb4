"""The page: what a relay does and what waits, live, for people (docs/operations.md, "The page").

Whoever reaches the address may look, as at the metrics: nothing shown holds a payload or a key. What does, and what
changes something, asks for the token of `OUTBOX_UI_TOKEN`, and is done by the command of the same name in a process of
its own: so it does and says what the command does and says, and costs the relay's loop, threads and memory nothing.

The token comes in the header Authorization, which no other site can make a browser send. No cookie: those of 127.0.0.1
are sent to every port of it.
"""

import asyncio
import hmac
import json
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from hashlib import sha256
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import structlog

from relay.config import RelayConfig
from relay.errors import DatabaseTrouble
from relay.http import Answer, Request, Route, Stream, refusal
from relay.monitor import Monitor
from relay.queries import REFUSED, TROUBLE
from relay.status import look
from relay.views import Chosen, Views

log = structlog.get_logger("relay")

LOOK_EVERY = 2.0
"""Seconds for which a look at the database is shown to everyone who watches."""

POINT_SECONDS = 1.0
"""Between two events of a stream."""

STREAMS = 8
"""Pages open at a time: the probes need connections too."""

LISTED = 50
"""Parked events that the page lists."""

ERROR_CHARACTERS = 300
"""Shown of a parked event's error."""

ERROR_SHOWN = 2_000
"""Characters of what a command says, the last ones: a bug's traceback is long."""

COMMAND_SECONDS = 60.0
"""A command that takes longer is given up; on a terminal it has no limit."""

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path → the file beside this module, and its type."""


class Page:
    """What the HTTP server answers to people's browsers."""

    def __init__(self, config: RelayConfig, monitor: Monitor) -> None:
        self._monitor = monitor
        self._config = config
        self._streams = 0
        self._seen: dict[str, Any] = {}
        self._listed: list[dict[str, Any]] = []
        self._seen_at = float("-inf")
        self._looking = asyncio.Lock()
        self._commanding = asyncio.Lock()

    def routes(self) -> dict[str, Route]:
        """By path."""
        served = {path: Route(_File(*file)) for path, file in FILES.items()}
        return {
            **served,
            "/events": Route(self._events),
            "/token": Route(self._is_right),
            "/parked/*": self._command("dead", "show", "--content"),
            "/parked/*/retry": self._command("dead", "retry", "--json", method="POST"),
            "/parked/*/discard": self._command("dead", "discard", "--yes", "--json", method="POST"),
            "/trace/*": self._command("trace", "--json"),
        }

    # ---- who may -----------------------------------------------------------------------------------------------------

    def _refused(self, request: Request) -> Answer | None:
        """Why not; None: the token is right."""
        token = self._config.page_token()
        if not token:
            return refusal(HTTPStatus.FORBIDDEN, words="For this the relay must be given a token: OUTBOX_UI_TOKEN.")
        scheme, _, given = (request.headers.get("Authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(given), _digest(token)):
            return None
        return refusal(HTTPStatus.UNAUTHORIZED, ("WWW-Authenticate", "Bearer"))

    async def _is_right(self, request: Request) -> Answer:
        """Whether the token given opens what asks for it."""
        return _json({"right": self._refused(request) is None})

    # ---- commands ----------------------------------------------------------------------------------------------------

    def _command(self, *words: str, method: str = "GET") -> Route:
        """The `relay` command of these words, about the event in the path."""

        async def answer(request: Request) -> Answer:
            if (refused := self._refused(request)) is not None:
                return refused
            topics = [f"--topic={topic}" for topic in request.query.get("topic", ()) if words[0] == "trace"]
            return _json(await self._run(*words, *topics, str(request.event)))

        return Route(answer, method, seconds=2 * COMMAND_SECONDS)

    async def _run(self, *arguments: str) -> dict[str, Any]:
        """{"exit_code", "document"} or {"exit_code", "error"}: as the command itself says."""
        async with self._commanding:  # one at a time, whatever is asked for
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "relay", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out = b""
            try:
                async with asyncio.timeout(COMMAND_SECONDS):
                    out, err = await process.communicate()
            except TimeoutError:
                said = f"it took longer than {COMMAND_SECONDS:g} s: on a terminal: relay {' '.join(arguments)}"
                err = said.encode()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.communicate()
        name = " ".join(word for word in arguments if not word.startswith("-"))
        log.info("command run for the page", command=name, exit_code=process.returncode)
        try:
            return {"exit_code": process.returncode, "document": json.loads(out)}
        except ValueError:
            said = err.decode(errors="replace").strip().removeprefix("relay: ")[-ERROR_SHOWN:]
            return {"exit_code": process.returncode, "error": said}

    # ---- live --------------------------------------------------------------------------------------------------------

    async def _events(self, _: Request) -> Answer | Stream:
        if self._streams >= STREAMS:
            words = f"{STREAMS} pages of this relay are open: close one."
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, ("Retry-After", "10"), words=words)
        return Stream(self._stream())

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        """`history` once, then `point` each second, and `state` and `parked` whenever they are others than before."""
        self._streams += 1
        try:
            yield b"retry: 2000\n\n" + _event("history", self._monitor.history.points())
            sent: dict[str, bytes] = {}
            while True:
                state, parked = await self._now()
                for name, document in (("state", state), ("parked", parked)):
                    event = _event(name, document)
                    if sent.get(name) != event:
                        sent[name] = event
                        yield event
                if points := self._monitor.history.points():
                    yield _event("point", points[-1])
                await asyncio.sleep(POINT_SECONDS)
        finally:
            self._streams -= 1

    async def _now(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What is known at this moment, and the parked events. What the database says is as of `at`, which stands still
        while it does not answer."""
        async with self._looking:
            if time.monotonic() - self._seen_at >= LOOK_EVERY:
                await self._look()
                self._seen_at = time.monotonic()
        account = {name: value for name, value in self._monitor.account().items() if name != "lanes"}
        own = {"host": socket.gethostname(), "pid": os.getpid(), "asks_for_token": bool(self._config.ui_token)}
        return {**account, "this": own, "database": self._seen}, self._listed

    async def _look(self) -> None:
        with suppress(*TROUBLE, *REFUSED, DatabaseTrouble):
            if (views := self._monitor.views) and (found := await self._monitor.asked(self._found(views))):
                self._seen, self._listed = found

    async def _found(self, views: Views) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Run by the relay's loop: a handful of bounded statements every LOOK_EVERY seconds while somebody watches."""
        own = self._monitor.account()["lanes"]
        seen = await look(views, own, {lane["lane"]: lane["floor"] for lane in own if lane["taken"]})
        self._monitor.history.pending = sum(lane["pending"] for lane in seen["lanes"])
        listed = await views.parked(Chosen(), LISTED) if seen["parked"] else []
        found = {**seen, "at": time.time(), "may_change_parked": await views.may_change_parked()}
        return found, [_listed(event) for event in listed]


class _File:
    """A route's answer that is a file."""

    def __init__(self, name: str, content_type: str) -> None:
        self._name, self._content_type = name, content_type

    async def __call__(self, _: Request) -> Answer:
        return Answer(HTTPStatus.OK, files("relay").joinpath("ui", self._name).read_bytes(), self._content_type)


def _listed(event: dict[str, Any]) -> dict[str, Any]:
    """A parked event for everyone: without its key."""
    shown = {name: event[name] for name in ("id", "lane", "type", "topic", "bytes", "died_at", "attempts", "held")}
    return {**shown, "error": event["error"][:ERROR_CHARACTERS]}


def _digest(token: str) -> bytes:
    """Compared in its place: of one length, whatever was given."""
    return sha256(token.encode(errors="replace")).digest()


def _event(name: str, document: Any) -> bytes:
    """As https://html.spec.whatwg.org/multipage/server-sent-events.html has it."""
    return f"event: {name}\ndata: {json.dumps(document, default=str)}\n\n".encode()


def _json(document: Any) -> Answer:
    return Answer(HTTPStatus.OK, json.dumps(document).encode(), "application/json")

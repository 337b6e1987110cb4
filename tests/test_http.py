"""The HTTP server: what it answers, what it refuses, and that it is never in the relay's way."""

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from http import HTTPStatus
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest
from structlog.testing import capture_logs

from relay import http
from relay.http import Answer, Request, Route, Server, Stream


async def _ok(_: Request) -> Answer:
    return Answer(HTTPStatus.OK, b"ok\n")


async def _fails(_: Request) -> Answer:
    raise ValueError("no page")


async def _echo(request: Request) -> Answer:
    return Answer(HTTPStatus.OK, f"{request.event} {request.headers['X-Said']}".encode())


async def _counts() -> AsyncGenerator[bytes, None]:
    try:
        for number in itertools.count():
            yield b"%d\n" % number
            await asyncio.sleep(0.005)
    finally:
        ENDED.set()


async def _counting(_: Request) -> Stream:
    return Stream(_counts())


ENDED = threading.Event()
"""A stream of `_counts` was given up."""

ROUTES = {
    "/livez": Route(_ok, by_any_name=True),
    "/page": Route(_ok),
    "/broken": Route(_fails),
    "/events/*/retry": Route(_echo, "POST"),
    "/stream": Route(_counting),
}


def wait_for(logs: list[Any], event: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := [line for line in list(logs) if line["event"] == event]:
            return dict(found[0])
        time.sleep(0.005)
    raise AssertionError(f"no {event!r} in {logs}")


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as logs:
        yield logs


@pytest.fixture
def port(logs: list[Any]) -> Iterator[int]:
    server = Server("127.0.0.1", 0, ROUTES)
    server.start()
    yield int(wait_for(logs, "http listening")["port"])
    server.stop()


def ask(port: int, method: str, path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def raw(port: int, request: bytes) -> bytes:
    """All that comes back; empty where the connection is closed without an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(request)
        answer = b""
        while more := client.recv(4096):
            answer += more
    return answer


def test_a_page_is_answered_and_head_gives_its_headers_only(port: int) -> None:
    response, body = ask(port, "GET", "/livez?verbose")
    assert (response.status, body) == (200, b"ok\n")
    head, nothing = ask(port, "HEAD", "/livez")
    assert (head.status, nothing) == (200, b"")
    assert head.getheader("Content-Length") == "3"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get"])
def test_other_methods_are_refused_with_those_that_are_allowed(port: int, method: str) -> None:
    response, _ = ask(port, method, "/livez")
    assert response.status == 405
    assert response.getheader("Allow") == "GET, HEAD"


EVENT = "01937f0c-5c5d-7e6b-8f0a-3f6d2c1b0a99"


def test_a_route_may_hold_an_event_s_id_and_have_a_method_of_its_own(port: int) -> None:
    response, body = ask(port, "POST", f"/events/{EVENT}/retry", **{"X-Said": "so"})
    assert (response.status, body) == (200, f"{EVENT} so".encode())
    for method in ("GET", "HEAD", "PUT"):
        response, _ = ask(port, method, f"/events/{EVENT}/retry")
        assert (response.status, response.getheader("Allow")) == (405, "POST")
    for no_id in ("*", "1", EVENT[:-1], EVENT + "0", EVENT.replace("a", "g"), f"{EVENT}/{EVENT}"):
        assert ask(port, "POST", f"/events/{no_id}/retry")[0].status == 404


@pytest.mark.parametrize("host", ["localhost", "localhost:9464", "127.0.0.1:1", "10.1.2.3", "[::1]:9464", "LocalHost"])
def test_who_asks_for_an_address_or_for_localhost_is_answered(port: int, host: str) -> None:
    assert ask(port, "GET", "/page", Host=host)[0].status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9464", "127.0.0.1.evil.example", "", "[", "localhost@e"]
)
def test_who_asks_for_another_name_is_not_answered(port: int, host: str) -> None:
    for path in ("/page", "/livez"):
        assert ask(port, "GET", path, Host=host)[0].status == 421


def test_of_a_server_that_others_reach_the_probes_answer_by_any_name_and_nothing_else(logs: list[Any]) -> None:
    server = Server("0.0.0.0", 0, ROUTES)  # noqa: S104 -- it is what is tried
    server.start()
    port = int(wait_for(logs, "http listening")["port"])
    assert ask(port, "GET", "/livez", Host="relay.orders.svc:9464")[0].status == 200
    assert ask(port, "GET", "/page", Host="relay.orders.svc:9464")[0].status == 421
    assert ask(port, "GET", "/page", Host=socket.gethostname())[0].status == 200
    server.stop()


def test_two_hosts_are_one_too_many(port: int) -> None:
    assert raw(port, b"GET /page HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_stream_goes_on_past_the_time_of_a_request_and_ends_with_its_reader(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.2)
    ENDED.clear()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        began, text = time.monotonic(), b""
        while time.monotonic() - began < 0.5:
            text += client.recv(4096)
    head, _, events = text.partition(b"\r\n\r\n")
    assert b"Content-Type: text/event-stream" in head
    assert events.startswith(b"0\n1\n2\n")
    assert ENDED.wait(30)


def test_a_body_that_nobody_reads_does_not_cost_the_client_its_answer(port: int) -> None:
    answer = raw(port, b"POST /livez HTTP/1.1\r\nContent-Length: 50000\r\n\r\n" + b"x" * 50_000)
    assert answer.startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /nowhere HTTP/1.1\r\n\r\n", 404),
        (b"GET /../livez HTTP/1.1\r\n\r\n", 404),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 404),
        (b"GET http://127.0.0.1/livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez\r\n\r\n", 400),
        (b"GET  /livez HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01 TLS\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nCookie: " + b"x" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /broken HTTP/1.1\r\n\r\n", 500),
    ],
)
def test_what_is_no_request_of_ours_is_refused(port: int, request_: bytes, status: int) -> None:
    assert raw(port, request_).startswith(f"HTTP/1.1 {status} ".encode())
    assert ask(port, "GET", "/livez")[0].status == 200, "and the next one is served"


def test_a_page_that_fails_says_nothing_of_why(port: int) -> None:
    assert b"no page" not in ask(port, "GET", "/broken")[1]


def test_who_does_not_finish_a_request_is_cut_off(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.05)
    assert raw(port, b"GET /livez HTTP/1.1\r\nHost: x") == b""


def test_more_connections_than_it_serves_at_a_time_are_closed(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(http, "CONNECTIONS", 1)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as first:
        deadline = time.monotonic() + 30
        while raw_or_reset(port) != b"":  # until the first one was accepted
            assert time.monotonic() < deadline
        first.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert first.recv(4096).startswith(b"HTTP/1.1 200 ")


def raw_or_reset(port: int) -> bytes:
    try:
        return raw(port, b"GET /livez HTTP/1.1\r\n\r\n")
    except OSError:
        return b""


def test_an_address_in_use_is_said_once_and_had_as_soon_as_it_is_free(
    monkeypatch: pytest.MonkeyPatch, logs: list[Any]
) -> None:
    monkeypatch.setattr(http, "AGAIN", 0.01)
    taken = socket.create_server(("127.0.0.1", 0))
    server = Server("127.0.0.1", taken.getsockname()[1], ROUTES)
    server.start()
    wait_for(logs, "http not listening")
    time.sleep(0.05)  # tries meanwhile
    taken.close()
    wait_for(logs, "http listening")
    assert [line["event"] for line in logs] == ["http not listening", "http listening"]
    server.stop()


def test_a_host_that_is_none_is_said_and_raises_nothing(logs: list[Any]) -> None:
    server = Server("no.such.host.invalid", 0, {})
    server.start()
    assert wait_for(logs, "http not listening")["error"]
    server.stop()


def test_it_stops_while_a_client_waits(logs: list[Any]) -> None:
    server = Server("127.0.0.1", 0, ROUTES)
    server.start()
    port = int(wait_for(logs, "http listening")["port"])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        ask(port, "GET", "/livez")  # behind the client, which is served by now
        server.stop()
        assert client.recv(1) == b""

"""What chat.py's server and the rating page share: who may connect, for how long, and what a body may be.

Not imported by runtime itself: training needs no server. All of it comes before the token is looked at.
"""
import asyncio
import hmac
import json
import re
import socket
from contextlib import suppress

import h11
import uvicorn
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.config import fail

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)  # the port may be a tunnel's
MOST_CONNECTIONS = 512
REQUEST_S = 20.0     # for a request to come whole, from its first byte or the connection's beginning
UNREAD_MS = 60_000   # for a client to take what it was sent


class Protocol(H11Protocol):
    """HTTP, but a connection whose request does not come whole in time is dropped, and so are too many at once."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # a part of the next request came meanwhile
            self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._stop_timer()

    def _watch(self) -> None:
        """The clock runs while the client owes us a part of a request."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_timer()
        elif self.timer is None:
            self.timer = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def listen(host: str, port: int) -> socket.socket:
    """A socket there; one line if that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        fail(f"host={host} port={port}: cannot listen there ({getattr(error, 'strerror', error)}): choose another port")
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
    return listener


def address(listener: socket.socket, host: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def server(app) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, http=Protocol,
                                         ws="none", lifespan="off"))


def serve(app, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    with listener, suppress(KeyboardInterrupt):  # which uvicorn raises again when it has stopped
        server(app).run([listener])


def knows_token(headers: Headers, token: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), token.encode())


def check_host(headers: Headers) -> None:
    """Refuse every name but this machine's own: without a token, a web page could get in by DNS rebinding.

    The header as it came, since a URL that a library makes of it may be another.
    """
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not OWN_HOST.fullmatch(hosts[0]):
        raise HTTPException(400, f"The host is '{', '.join(hosts)[:100]}', expected one of {', '.join(LOOPBACK)}")


async def read_body(request: Request, most: int):
    """A request's JSON. Its content type must say so: web pages may not send that elsewhere without asking."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(400, "The content type is not application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "The body is compressed: send it as it is")
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise HTTPException(413, f"The body has more than {most:,} bytes: shorten it")
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise HTTPException(400, "The body holds half a surrogate pair, expected whole characters") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The body is not JSON ({str(error)[:100]})") from None
    return body

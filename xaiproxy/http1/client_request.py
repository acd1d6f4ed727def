"""A client's request, as the handler passes it to the application."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from xaiproxy import errors
from xaiproxy.http1.request_body import RequestBody
from xaiproxy.http1.request_head import Head


class Watch(Protocol):
    """What client_watch.ClientWatch does; on a foreign WSGI server nothing."""

    def start(self) -> None: ...


class ClientRequest:
    """`key`: the name of the client key that was shown, for the log.

    `waited`: seconds for upstream, of all exchanges. `token_refused`: what became of a response
    that refused the access token, replayed or passed_on; "" if there was none. `refusal`: the
    response of the proxy's own that is sent. `send_interim`: takes the status and the header text
    of a 1xx response to the client. `all_in_use`: the number of connections if all of them have a
    request already, else 0. `span`: what traces have begun for it, or None.
    """

    __slots__ = (
        "all_in_use",
        "body",
        "head",
        "key",
        "refusal",
        "send_interim",
        "span",
        "token_refused",
        "waited",
        "watch",
    )

    def __init__(
        self,
        head: Head,
        body: RequestBody,
        watch: Watch,
        send_interim: Callable[[int, str], None],
        all_in_use: int = 0,
    ):
        self.head = head
        self.body = body
        self.watch = watch
        self.send_interim = send_interim
        self.all_in_use = all_in_use
        self.key: str | None = None
        self.waited = 0.0
        self.token_refused = ""
        self.refusal: errors.ErrorResponse | None = None
        self.span: Any = None

    def check_room(self) -> None:
        """Raises TooManyConnections."""
        if self.all_in_use:
            raise errors.TooManyConnections(
                f"all {self.all_in_use} connections are in use (XAI_PROXY_MAX_CONNECTIONS); "
                "try again"
            )

"""The status page: a static shell without data, which its script fills from /status.json.

The Content-Security-Policy allows this style and this script alone, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import flask

from xaiproxy import config, provider

PAGE = Path(__file__).with_name("page.html")
BLOCK = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)
# The clients, a line of JSON each.
CLIENTS = re.compile(r'(?<=id="snippets">\n\[\n).*?(?=\n\]\n</script>)', re.DOTALL)
MODEL = re.compile(r"grok[- ]4\.5", re.IGNORECASE)  # the only model that most clients' files name
OF_XAI = re.compile(r"\bxai\b|x\.ai|grok", re.IGNORECASE)
ALLOWED = ("connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'")


def digest(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def policy(page: str) -> str:
    """The Content-Security-Policy of a page with inline styles and scripts."""
    inline = [f"{kind}-src 'sha256-{digest(text)}'" for kind, text in BLOCK.findall(page)]
    return "; ".join(("default-src 'none'", *inline, *ALLOWED))


def without_xai(page: str) -> str:
    """The page without xAI's model, and without clients whose files have more of xAI in them."""

    def general(clients: re.Match[str]) -> str:
        lines = MODEL.sub("MODEL", clients[0]).splitlines()
        return ",\n".join(line.removesuffix(",") for line in lines if not OF_XAI.search(line))

    return CLIENTS.sub(general, page)


class StatusPage:
    def __init__(self, settings: config.Config) -> None:
        self._content = PAGE.read_text("utf-8")
        if not provider.is_xai(settings.client_id, settings.issuer):
            self._content = without_xai(self._content)
        self._fields = {
            "Content-Security-Policy": policy(self._content),
            # The page is checked by its ETag at each use.
            "Cache-Control": "no-cache",
            "Vary": "Accept",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        self._etag = digest(self._content)

    def response(self, request: flask.Request) -> flask.Response:
        """The page, or a 304 if the client has it."""
        answer = flask.Response(self._content, headers=self._fields, mimetype="text/html")
        answer.set_etag(self._etag)
        answer.make_conditional(request)
        return answer


def is_wanted(request: flask.Request) -> bool:
    """Whether the client prefers HTML to JSON, as browsers do; agents get a hint instead."""
    kinds = ("text/html", "application/json")
    return request.accept_mimetypes.best_match(kinds, kinds[0]) == kinds[0]

"""The provider of the login and the API: xAI or its simulation, or another one.

Of another provider no more is known than OAuth 2.0 and the API's own responses: messages and the
status page then do not name xAI, and nothing is asked for that only xAI has. Where a token may be
sent is decided elsewhere (token_store.py, oauth/discovery.py).
"""

from __future__ import annotations

import urllib.parse

from xaiproxy import config

XAI = "xAI"
ITS_PAGES = "the provider's own pages"  # in place of an address of xAI


def is_xai(client_id: str, issuer: str = "") -> bool:
    """The default client is known to xAI, and to the sandbox, whose issuer is another one."""
    return client_id == config.DEFAULT_CLIENT_ID or issuer == config.DEFAULT_ISSUER


def name(settings: config.Config) -> str:
    """Return "xAI", or the issuer's host, with its port if it has one."""
    if is_xai(settings.client_id, settings.issuer):
        return XAI
    return urllib.parse.urlsplit(settings.issuer).netloc

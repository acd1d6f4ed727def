"""The client keys in a request: `Authorization: Bearer KEY` and `X-Api-Key: KEY`."""

from __future__ import annotations

from xaiproxy.http1.request_head import Head

FIELDS = ("authorization", "x-api-key")


def of(head: Head) -> list[str]:
    """Return the keys that can be checked, at most one of each header field."""
    keys = []
    for field in FIELDS:
        values = head.values(field)
        # Of two, servers could use different ones.
        key = _key_in(field, values[0]) if len(values) == 1 else None
        if key:
            keys.append(key)
    return keys


def faults(head: Head) -> list[str]:
    """Return what is wrong with each of the keys, none of which is valid; nothing without a key.

    No value is quoted: one without a scheme may be a key.
    """
    found = []
    for field in FIELDS:
        values = head.values(field)
        # Claude Code hides a message that names x-api-key.
        name = "Authorization" if field == "authorization" else "the header field of the API key"
        if len(values) > 1:
            found.append(f"{name} was sent more than once")
        elif values and values[0].lower() in ("", "bearer"):
            found.append(f"{name} was sent without a key (is the variable that holds it empty?)")
        elif values and _key_in(field, values[0]) is None:
            found.append(f"{name} was sent in another form than `Bearer KEY`")
    keys = set(of(head))
    if len(keys) > 1:
        found.append("two different client keys were sent, and neither is one of this proxy's")
    elif keys:
        found.append("the client key sent is not one of this proxy's")
    return found


def _key_in(field: str, value: str) -> str | None:
    """The key, or None if the scheme of Authorization is not Bearer."""
    if field == "x-api-key":
        return value
    scheme, _, key = value.rpartition(" ")
    return key if scheme.strip().lower() == "bearer" else None

"""What the heads of requests and responses have in common (RFC 9112 sections 2 and 5).

Where a head ends, and its fields.
"""

from __future__ import annotations

import re

NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
NAMES = re.compile(rf"{NAME.pattern}(?:\n{NAME.pattern})*")
# In a line.
ALLOWED = bytes((9, *range(0x20, 0x7F), *range(0x80, 0x100)))
BARE_LF = re.compile(rb"(?<!\r)\n")
FIELD_LIMIT = 200


class Malformed(ValueError):
    """The message names the fault, and repeats nothing of the input."""


class TooLong(Malformed):
    pass


def end(data: bytes, searched: int, limit: int) -> int:
    """Where the head ends, after its empty line; 0 if it is not complete yet.

    `searched`: number of bytes that were searched before. Raises Malformed and TooLong as soon as
    no further byte can make it valid.
    """
    found = data.find(b"\r\n\r\n", max(0, searched - 3))
    size = found + 4 if found >= 0 else len(data)
    if (found < 0 or size > limit) and BARE_LF.search(data, max(0, searched - 1), limit + 1):
        raise Malformed("has a line that does not end with CRLF")
    if size > limit:
        raise TooLong(f"is longer than {limit} bytes")
    return size if found >= 0 else 0


def lines(head: bytes) -> list[str]:
    """The lines of a complete head, without its empty one, as Latin-1.

    Raises Malformed at any control character.
    """
    split = head.decode("latin-1").split("\r\n")
    if head.translate(None, ALLOWED) != b"\r\n" * (len(split) - 1):
        raise Malformed("has a control character, or a line that does not end with CRLF")
    return split[:-2]


def parted(lines: list[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """The names of header lines in lower case, and the lines parted at their colons.

    Raises Malformed, TooLong.
    """
    if len(lines) > FIELD_LIMIT:
        raise TooLong(f"has more than {FIELD_LIMIT} header lines")
    parts = [line.partition(":") for line in lines]
    # All names at once, which costs a sixth of a match for each.
    names = "\n".join([part[0] for part in parts])
    if parts and (NAMES.fullmatch(names) is None or "" in [part[1] for part in parts]):
        raise Malformed("has a header line that is malformed: expected Name: value")
    return names.lower().split("\n") if parts else [], parts


def fields(lines: list[str]) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """The fields in order, as sent; and the values of each name in lower case.

    Raises Malformed, TooLong.
    """
    names, parts = parted(lines)
    in_order = [(part[0], part[2].strip(" \t")) for part in parts]
    values: dict[str, list[str]] = {}
    for name, field in zip(names, in_order, strict=True):
        if name in values:
            values[name].append(field[1])
        else:
            values[name] = [field[1]]
    return in_order, values


def connection_options(connection: str) -> set[str]:
    """The names in a value of Connection, in lower case (RFC 9110 section 7.6.1)."""
    return {option.strip(" \t") for option in {*connection.lower().split(",")}} - {""}


def keep_alive(values: dict[str, list[str]], is_1_0: bool) -> bool:
    """Whether the connection stays open (RFC 9112 section 9.3)."""
    if "connection" not in values:
        return not is_1_0
    options = connection_options(",".join(values["connection"]))
    return "close" not in options and (not is_1_0 or "keep-alive" in options)


def normal_authority(scheme: str, authority: str) -> str:
    """The authority in lower case, without the scheme's default port (RFC 9110 section 4.2.3)."""
    host, colon, port = authority.lower().rpartition(":")
    return (
        host if colon and port in ("", "443" if scheme == "https" else "80") else authority.lower()
    )

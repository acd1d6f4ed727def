"""The .env of the working directory: our settings among those of other programs.

Values are taken as they are, without interpolation of ${}. Lines of other programs may be in any
encoding.
"""

import io
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import dotenv.parser

from xaiproxy import errors, folder_file

NOT_UTF_8 = re.compile("[\udc80-\udcff]")
SIZE_LIMIT = 1 << 20  # bytes


def read(
    path: str,
    prefix: str,
    complain: Callable[[errors.ConfigurationError], object],
    warn: Callable[[str], object],
) -> dict[str, str]:
    """The variables whose names begin with `prefix`; none if there is no file, or an unsafe one."""
    if not os.path.isfile(path):
        return {}
    shown = os.path.abspath(path)
    try:
        content, status = folder_file.read(Path(path), SIZE_LIMIT + 1, follow=True)
        if len(content) > SIZE_LIMIT:
            raise ValueError(f"it is longer than {SIZE_LIMIT} bytes")
    except (OSError, ValueError) as error:
        complain(errors.ConfigurationError(f"{shown} cannot be read: {error}"))
        return {}
    ours = {}
    text = content.decode("utf-8-sig", "surrogateescape")
    for statement in dotenv.parser.parse_stream(io.StringIO(text, newline=None)):
        name, value = statement.key or "", statement.value or ""
        if statement.error and prefix in statement.original.string:
            complain(_parse_error(shown, prefix, statement.original))
        elif name.startswith(prefix) and NOT_UTF_8.search(value):
            message = f"{shown} cannot be read: {name} is not UTF-8"
            complain(errors.ConfigurationError(message, name))
        elif name.startswith(prefix):
            ours[name] = value
    if ours and (danger := _danger(status)):
        complain(errors.ConfigurationError(f"{shown} {danger}"))
        return {}
    if ours and status.st_mode & stat.S_IWGRP:
        warn(
            f"{shown} is writable by its group, whose members could admit other clients or have "
            "you sign in at another issuer; chmod g-w it"
        )
    return ours


def _parse_error(
    shown: str, prefix: str, statement: dotenv.parser.Original
) -> errors.ConfigurationError:
    # An unclosed quote swallows the lines up to the next quote, which may hold further settings.
    before, _, rest = statement.string.partition(prefix)
    line = statement.line + before.count("\n")
    name = prefix + re.split(r"\W", rest, maxsplit=1)[0]
    return errors.ConfigurationError(
        f"{shown} line {line} does not parse: write {name}=VALUE, and close every quote",
        None if prefix in rest else name,
    )


def _danger(status: os.stat_result) -> str:
    """Why a file cannot be trusted, or "": its XAI_PROXY_ISSUER would receive the next login."""
    if status.st_uid not in (0, os.geteuid()):
        return (
            f"belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}, so "
            "its settings cannot be trusted; start in another folder, chown it, or set them in the "
            "environment"
        )
    if status.st_mode & stat.S_IWOTH:
        return (
            "is writable by every user, so its settings cannot be trusted; check them and "
            "chmod o-w it"
        )
    return ""

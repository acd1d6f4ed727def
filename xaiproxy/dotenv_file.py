"""The .env of the working directory: settings of ours among those of other programs."""

import io
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import dotenv.parser

from xaiproxy import errors, folder_file

SURROGATE = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8
SIZE_LIMIT = 1 << 20  # bytes


def read(
    path: str, prefix: str, complain: Callable, warn: Callable[[str], object]
) -> dict[str, str]:
    # Only our own names: a .env often belongs to somebody else's program. No ${} interpolation: values are values.
    if not os.path.isfile(path):
        return {}
    try:
        content, status = folder_file.read(Path(path), SIZE_LIMIT + 1, follow=True)
        if len(content) > SIZE_LIMIT:
            raise ValueError(f"it is longer than {SIZE_LIMIT} bytes")
    except (OSError, ValueError) as error:
        complain(errors.ConfigurationError(f"{os.path.abspath(path)} cannot be read: {error}"))
        return {}
    ours = {}
    text = content.decode(
        "utf-8-sig", "surrogateescape"
    )  # lines that are not ours may be in any encoding
    for statement in dotenv.parser.parse_stream(io.StringIO(text, newline=None)):
        name, value = statement.key or "", statement.value or ""
        if statement.error and prefix in statement.original.string:
            complain(_unparsed(path, prefix, statement.original))
        elif name.startswith(prefix) and SURROGATE.search(value):
            complain(
                errors.ConfigurationError(
                    f"{os.path.abspath(path)} cannot be read: {name} is not UTF-8", name
                )
            )
        elif name.startswith(prefix):
            ours[name] = value
    if ours and (wrong := _wrong_with_file(status)):
        complain(errors.ConfigurationError(f"{os.path.abspath(path)} {wrong}"))
        return {}
    if ours and status.st_mode & stat.S_IWGRP:
        warn(
            f"{os.path.abspath(path)} may be written by its group, who could have others call, or sign you in elsewhere; "
            "chmod g-w it"
        )
    return ours


def _unparsed(
    path: str, prefix: str, statement: dotenv.parser.Original
) -> errors.ConfigurationError:
    # An unclosed quote may take the lines up to the next quote with it, and so several settings.
    start = statement.string.index(prefix)
    line = statement.line + statement.string.count("\n", 0, start)
    name = re.match(r"\w+", statement.string[start:])[0]
    return errors.ConfigurationError(
        f"{os.path.abspath(path)} line {line} does not parse: write {name}=VALUE, and close "
        "every quote",
        name if statement.string.count(prefix) == 1 else None,
    )


def _wrong_with_file(status: os.stat_result) -> str:
    """Why nothing is to be believed that stands in a file: a stranger who sets ISSUER is who the next login goes to."""
    if status.st_uid not in (0, os.geteuid()):
        return (
            f"belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}: its settings may be a "
            "stranger's; start in another folder, chown it, or set them in the environment"
        )
    if status.st_mode & stat.S_IWOTH:
        return "may be written by every user, so its settings may be a stranger's; look through it and chmod o-w it"
    return ""

"""What a check of --doctor found, in one line."""

from typing import NamedTuple

LABELS = {"ok": "ok", "warning": "warning", "failure": "FAILED", "skipped": "skipped"}


class Finding(NamedTuple):
    """`result`: a key of LABELS. `exit_code`: that of a failure, else 0."""

    result: str
    message: str
    exit_code: int = 0


def ok(message: str) -> Finding:
    return Finding("ok", message)


def warning(message: str) -> Finding:
    return Finding("warning", message)


def failure(exit_code: int, message: str) -> Finding:
    return Finding("failure", message, exit_code)


def skipped(message: str) -> Finding:
    return Finding("skipped", message)

"""The knobs of the sandbox: one table for ``--help``, the options and ``POST /_sandbox``.

The option ``--access-token-lifetime 3`` is the JSON member ``{"access_token_lifetime": 3}``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from xaiproxy.sandbox import replies, xai_errors

Check = Callable[[Any], str]  # returns "" for a valid value, else a description of valid ones


class BadKnob(ValueError):
    """An unknown knob, an unknown field of a scripted response, or an invalid value."""


class Knob(NamedTuple):
    default: Any
    check: Check
    help: str


def number(
    minimum: float,
    maximum: float = 10**9,
    unset: bool = False,
    kinds: tuple[type, ...] = (int, float),
) -> Check:
    def check(value: Any) -> str:
        good = (type(value) in kinds and minimum <= value <= maximum) or (unset and value is None)
        what = "a whole number" if kinds == (int,) else "a number"
        return "" if good else f"{what} from {minimum} to {maximum}" + " or null" * unset

    return check


def whole(minimum: int, maximum: int = 10**9, unset: bool = False) -> Check:
    return number(minimum, maximum, unset, (int,))


def one_of(*values: Any) -> Check:
    # With the types, since 1 == True.
    wanted = [(type(value), value) for value in values]
    return lambda value: (
        "" if (type(value), value) in wanted else " or ".join(map(replies.compact, values))
    )


def of_type(kind: type | tuple[type, ...], name: str) -> Check:
    return lambda value: "" if isinstance(value, kind) else name


yes_no = one_of(True, False)


def header_fields(value: Any) -> str:
    good = isinstance(value, dict) and all(
        isinstance(text, str) and text.isprintable() and text.isascii()
        for field in value.items()
        for text in field
    )
    return "" if good else "an object of printable strings"


# The fields of a scripted response. With error, status, body or cut the request is not handled at
# all, except with `process`. Without these it is handled as usual, and only delayed or throttled.
SCRIPT = {
    "path": Knob(
        None, of_type(str, "a path; a final * matches any rest"), "the path of the requests"
    ),
    "method": Knob(None, of_type(str, "a method"), "only for this method"),
    "grant_type": Knob(
        None, of_type(str, "a grant_type"), "only for this grant_type, at /oauth2/token"
    ),
    "times": Knob(None, whole(1, unset=True), "number of requests; null: all"),
    "error": Knob(None, one_of(*sorted(xai_errors.ERRORS)), "answer with this error of xAI"),
    "status": Knob(None, whole(200, 599), "answer with this status"),
    "headers": Knob({}, header_fields, "and these headers, which replace usual ones"),
    "body": Knob(None, of_type((str, dict, list), "a string or JSON"), "answer with this body"),
    "process": Knob(False, yes_no, "handle the request before sending the scripted response"),
    "early": Knob(False, yes_no, "answer without reading the request's body"),
    "delay": Knob(0, number(0), "s before the response, after the request is handled"),
    "cut": Knob(
        None, one_of("close", "reset"), "end the connection instead of answering, by FIN or RST"
    ),
    "drip": Knob(None, number(0.01, unset=True), "bytes of the body a second"),
}
NO_SCRIPT = {name: field.default for name, field in SCRIPT.items()}


def answers(value: Any) -> str:
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and "path" in item for item in value
    ):
        return "a list of objects, each with a path"
    for item in value:
        _validate(SCRIPT, item, "answers: ")
    return ""


KNOBS = {
    "idle_timeout": Knob(
        None, number(0.001, unset=True), "s until an idle connection is closed; null: never"
    ),
    "access_token_lifetime": Knob(21600, whole(1), "lifetime of an access token, in s"),
    "send_expires_in": Knob(True, yes_no, "include expires_in in token responses"),
    "send_refresh_token": Knob(
        True, yes_no, "rotate the refresh token; false: omit it, the old one stays valid"
    ),
    "grace": Knob(0, number(0), "s in which a rotated refresh token is still accepted"),
    "auto_approve": Knob(
        None, number(0, unset=True), "s after which every login is approved; null: by hand"
    ),
    "code_lifetime": Knob(60, number(0), "lifetime of an authorization code, in s"),
    "device_lifetime": Knob(900, number(1), "lifetime of a device code, in s"),
    "device_interval": Knob(5, number(0), "s between two polls; sooner is answered slow_down"),
    "slow_downs": Knob(0, whole(0), "number of next device polls that get slow_down at any pace"),
    "refuse_fresh": Knob(0, whole(0), "times that the API refuses each new access token"),
    "dead_token_status": Knob(403, one_of(403, 401), "status for a dead access token, 403 or 401"),
    "old_shape": Knob(False, yes_no, "refuse tokens with the older kind of body, with [WKE=...]"),
    "gzip": Knob(
        "refusals", one_of("refusals", "all", "none"), "compress refusals of a token, all or none"
    ),
    "events": Knob(20, whole(0), "deltas in a streamed response"),
    "event_size": Knob(None, whole(1, unset=True), "bytes of text in a delta; null: a word"),
    "events_per_second": Knob(0, number(0), "rate of a stream; 0: as fast as it is read"),
    "first_event_delay": Knob(0, number(0), "s between the head of a stream and its first event"),
    "keepalives": Knob(0, whole(0), "comments sent before the first event"),
    "silence_after": Knob(None, whole(0, unset=True), "events after which a stream falls silent"),
    "silence": Knob(3600, number(0), "duration of that silence, in s"),
    "cut_after": Knob(
        None, whole(0, unset=True), "events after which a stream is cut, within the next"
    ),
    "cut": Knob("close", one_of("close", "reset"), "how it is cut: close (FIN) or reset (RST)"),
    "capacity_error_after": Knob(
        None, whole(0, unset=True), "events after which a stream ends in an error"
    ),
    "framing": Knob(
        "chunked", one_of("chunked", "length", "close"), "of a stream: chunked, length or close"
    ),
    "close_code": Knob(
        None, whole(1000, 4999, unset=True), "close /v1/realtime with this code once it has begun"
    ),
    "cache_servers": Knob(
        0, whole(0), "number of servers with a prompt cache of their own; 0: nothing is cached"
    ),
    "credit_usage_percent": Knob(
        37.5, number(0, 1000), "percentage of the weekly pool that is used"
    ),
    "prepaid_balance": Knob(0, whole(0), "prepaid balance, in US cents"),
    "subscription_tier": Knob("SuperGrok", of_type(str, "a string"), "plan of the account"),
    "answers": Knob([], answers, "scripted responses: a JSON list of objects as described below"),
}


class Knobs:
    """The knobs as attributes."""

    slow_downs: int

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, **values: Any) -> None:
        self._start = {name: knob.default for name, knob in KNOBS.items()}
        _validate(KNOBS, values)
        self._start.update(values)
        self.reset()

    def reset(self) -> None:
        self.set(self._start)

    def set(self, values: dict[str, Any]) -> None:
        """Set these, or raise BadKnob and set none."""
        _validate(KNOBS, values)
        for name, value in values.items():
            # Copied, since take_answer changes them.
            if name == "answers":
                value = [{**NO_SCRIPT, **item} for item in value]
            setattr(self, name, value)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in KNOBS}

    def matching(self, method: str, path: str) -> list[dict[str, Any]]:
        """The scripted responses for this request, of any grant_type."""
        return [
            answer
            for answer in self.answers
            if answer["method"] in (None, method)
            and (
                path == answer["path"]
                or (answer["path"].endswith("*") and path.startswith(answer["path"][:-1]))
            )
        ]

    def take_answer(self, method: str, path: str, grant_type: str | None) -> dict[str, Any] | None:
        """The first scripted response for this request; counts one of its `times`."""
        for answer in self.matching(method, path):
            if answer["grant_type"] in (None, grant_type):
                if answer["times"] is not None:
                    answer["times"] -= 1
                    if not answer["times"]:
                        self.answers.remove(answer)
                return answer
        return None


def _validate(table: dict[str, Knob], values: dict[str, Any], where: str = "") -> None:
    for name, value in values.items():
        if name not in table:
            raise BadKnob(f"{where}there is no {name}; there are {', '.join(table)}")
        if wanted := table[name].check(value):
            raise BadKnob(f"{where}{name} must be {wanted}, not {replies.compact(value)}")

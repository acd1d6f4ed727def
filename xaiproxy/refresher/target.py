"""What a login can be published in, and what of its content must never be replaced."""

from typing import Protocol

from xaiproxy import errors, token_json


class Target(Protocol):
    """What the login is published in; `str()` names it in a sentence."""

    def publish(self, content: str, issued_at: float) -> bool:
        """Make `content` what the target holds; return whether it held something else.

        `issued_at`: of the login, in unix seconds. Raises PublishError, as over a newer login.
        """


def check_replaceable(content: bytes, issued_at: float, target: object) -> None:
    """Raise PublishError if a target's content must stay.

    That is a newer login than the one of `issued_at`, or one with a refresh token, as in the token
    file itself. Content that is no login may be replaced.
    """
    try:
        held = token_json.from_json(content)
    except ValueError:
        return
    if held.refresh_token is not None:
        raise errors.PublishError(
            f"{target} holds a refresh token, which is left there; name another place in "
            "XAI_PROXY_PUBLISH"
        )
    if (held.issued_at() or 0.0) > issued_at:
        raise errors.PublishError(
            f"{target} holds a newer login than the token file; stop this refresher if another one "
            "publishes there, or sign in again"
        )


def issued_at_of(content: bytes) -> float:
    """Return when a target's login was issued, in unix seconds; 0 if that is unknown."""
    try:
        return token_json.from_json(content).issued_at() or 0.0
    except ValueError:
        return 0.0

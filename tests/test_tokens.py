"""A login: its state and age at a time, and the claims of its tokens."""

import base64
import json
import math

import pytest

from xaiproxy import tokens
from xaiproxy.sandbox.xai_errors import ERRORS
from xaiproxy.tokens import State


def jwt(**claims) -> str:
    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none'})}.{part(claims)}.sig"


def make(**members) -> tokens.Login:
    return tokens.Login(
        **{
            "access_token": "access",
            "refresh_token": "refresh",
            "expires_at": 2000,
            "obtained_at": 1000,
            **members,
        }
    )


# when a token is renewed


@pytest.mark.parametrize(
    "lifetime, skew, margin",
    [
        # A fifth of six hours.
        (21600, 120, 4320),
        # A fifth of fifteen minutes is still more than the skew.
        (900, 120, 180),
        # The skew is more than a fifth.
        (500, 120, 120),
        # Never over half.
        (200, 120, 100),
        (3, 120, 1.5),
    ],
)
def test_a_token_is_stale_when_less_than_the_margin_is_left(lifetime, skew, margin):
    login = make(obtained_at=0, expires_at=lifetime)
    assert login.state(lifetime - margin, skew) is State.FRESH
    assert login.state(lifetime - margin + 0.001, skew) is State.STALE


def test_a_token_is_invalid_from_the_second_of_its_expiry():
    login = make(obtained_at=0, expires_at=100)
    assert login.state(99.999, 10) is State.STALE
    assert login.state(100, 10) is State.INVALID


@pytest.mark.parametrize("obtained_at", [None, 2000, 3000])
def test_without_a_lifetime_the_margin_is_the_skew(obtained_at):
    login = make(obtained_at=obtained_at, expires_at=2000)
    assert login.lifetime() is None
    assert login.state(1880, 120) is State.FRESH
    assert login.state(1880.001, 120) is State.STALE


def test_a_jwt_gives_the_lifetime_and_age_of_a_file_without_obtained_at():
    login = make(access_token=jwt(iat=500, exp=2000), obtained_at=None)
    assert login.lifetime() == 1500
    assert login.age(600) == 100


@pytest.mark.parametrize(
    "obtained_at, now, age",
    [(1000, 1000, 0), (1000, 1060, 60), (None, 1000, math.inf), (1000, 999.9, math.inf)],
)
def test_an_unknown_or_negative_age_counts_as_old(obtained_at, now, age):
    assert make(obtained_at=obtained_at).age(now) == age


# claims


@pytest.mark.parametrize(
    "token", ["", "a", "a.b", "a.!.c", "é.é.é", "a." + "W" * 200000 + ".c", f"a.{'WzFd'}.c"]
)
def test_a_malformed_jwt_has_no_claims(token):
    assert tokens.jwt_claims(token) == {}


def test_deeply_nested_claims_are_ignored():
    deep = base64.urlsafe_b64encode(b"[" * 100000).decode()
    assert tokens.jwt_claims(f"a.{deep}.c") == {}


def test_a_token_is_in_no_repr():
    assert "access" not in repr(make()).replace("access_token", "") and "refresh'" not in repr(
        make()
    )
    assert tokens.fingerprint("refresh") not in repr(make())


# the API's errors


@pytest.mark.parametrize("name", [name for name, (status, *_) in ERRORS.items() if status == 403])
def test_only_a_403_about_the_token_counts_as_a_refused_token(name):
    body = ERRORS[name][1]
    body = (body if isinstance(body, str) else json.dumps(body)).encode()
    assert tokens.is_refusal(body) is name.startswith("bad_credentials")

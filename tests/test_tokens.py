"""The Tokens value: from a token response, its state at a time, to and from the file's JSON."""

import base64
import dataclasses
import json
import math

import pytest

from xaiproxy import config, tokens
from xaiproxy.sandbox.xai_errors import ERRORS
from xaiproxy.tokens import State

FIELDS = {
    "now": 1000.0,
    "issuer": "https://auth.x.ai",
    "client_id": "client",
    "token_endpoint": "https://auth.x.ai/t",
}


def jwt(**claims) -> str:
    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none'})}.{part(claims)}.sig"


def make(**members) -> tokens.Tokens:
    return tokens.Tokens(
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
        (21600, 120, 4320),  # a fifth of six hours
        (900, 120, 180),  # a fifth of fifteen minutes is still more than the skew
        (500, 120, 120),  # the skew is more than a fifth
        (200, 120, 100),  # never over half
        (3, 120, 1.5),
    ],
)
def test_a_token_is_stale_when_less_than_the_margin_is_left(lifetime, skew, margin):
    login = make(obtained_at=0, expires_at=lifetime)
    assert login.state(lifetime - margin, skew) is State.FRESH
    assert login.state(lifetime - margin + 0.001, skew) is State.STALE


def test_a_token_is_invalid_from_the_second_it_expires():
    login = make(obtained_at=0, expires_at=100)
    assert login.state(99.999, 10) is State.STALE
    assert login.state(100, 10) is State.INVALID


@pytest.mark.parametrize("obtained_at", [None, 2000, 3000])
def test_without_a_lifetime_the_margin_is_the_skew(obtained_at):
    login = make(obtained_at=obtained_at, expires_at=2000)
    assert login.lifetime() is None
    assert login.state(1880, 120) is State.FRESH
    assert login.state(1880.001, 120) is State.STALE


def test_a_jwt_tells_the_lifetime_and_age_of_a_file_without_obtained_at():
    login = make(access_token=jwt(iat=500, exp=2000), obtained_at=None)
    assert login.lifetime() == 1500
    assert login.age(600) == 100


@pytest.mark.parametrize(
    "obtained_at, now, age",
    [(1000, 1000, 0), (1000, 1060, 60), (None, 1000, math.inf), (1000, 999.9, math.inf)],
)
def test_an_unknown_or_negative_age_counts_as_old(obtained_at, now, age):
    assert make(obtained_at=obtained_at).age(now) == age


# from a token response


def test_expires_at_comes_from_expires_in_else_from_the_jwt_else_an_hour():
    def expiry(**response):
        return tokens.from_response({"access_token": "a", **response}, **FIELDS).expires_at

    assert expiry(expires_in=21600, access_token=jwt(exp=5)) == 22600
    assert expiry(expires_in="60") == 1060
    assert expiry(access_token=jwt(exp=4321)) == 4321
    assert expiry() == 4600
    for nonsense in (0, -1, None, "soon", True, [], float("nan"), float("inf"), "²"):
        assert expiry(expires_in=nonsense, access_token=jwt(exp=4321)) == 4321
    assert expiry(access_token=jwt(exp="never")) == 4600


@pytest.mark.parametrize("now", [1000, 864000])
def test_without_expires_in_the_lifetime_is_the_jwts_whatever_this_machines_clock_says(now):
    fields = {**FIELDS, "now": now}
    assert (
        tokens.from_response({"access_token": jwt(iat=500000, exp=521600)}, **fields).expires_at
        == now + 21600
    )
    assert tokens.from_response({"access_token": jwt(iat=9, exp=5)}, **fields).expires_at == 5


def test_an_answer_without_refresh_token_keeps_the_former_one():
    former = make(account="a@example.org", scope="one two", extra={"note": [1]})
    login = tokens.from_response({"access_token": "new"}, former=former, **FIELDS)
    assert (login.access_token, login.refresh_token) == ("new", "refresh")
    assert (login.account, login.scope, login.extra) == ("a@example.org", "one two", {"note": [1]})
    assert (login.issuer, login.client_id, login.token_endpoint, login.obtained_at) == (
        "https://auth.x.ai",
        "client",
        "https://auth.x.ai/t",
        1000,
    )


def test_an_answer_clears_the_former_refresh_error():
    former = make(refresh_error=tokens.RefreshError("x", "y", 1))
    assert (
        tokens.from_response({"access_token": "new"}, former=former, **FIELDS).refresh_error is None
    )


def test_the_account_is_the_id_tokens_email():
    def account(**claims):
        return tokens.from_response(
            {"access_token": "a", "id_token": jwt(**claims)}, former=make(account="old@b"), **FIELDS
        ).account

    assert account(email="a@example.org") == "a@example.org"
    for nonsense in ("", "a\x1b[31m@b", "é@example.org", 5, None, "a" * 255):
        assert account(email=nonsense) == "old@b"


@pytest.mark.parametrize(
    "response",
    [
        {},
        {"access_token": None},
        {"access_token": ""},
        {"access_token": 5},
        {"access_token": "a b"},
        {"access_token": "a\r\nX-Evil: 1"},
        {"access_token": "é"},
    ],
)
def test_an_answer_that_cannot_be_used_is_a_value_error_that_repeats_no_value(response):
    with pytest.raises(ValueError, match="^holds (no|a) [a-z_]+ ") as caught:
        tokens.from_response(response, **FIELDS)
    assert "Evil" not in str(caught.value)


@pytest.mark.parametrize(
    "token", ["", "a", "a.b", "a.!.c", "é.é.é", "a." + "W" * 200000 + ".c", f"a.{'WzFd'}.c"]
)
def test_what_is_no_jwt_has_no_claims(token):
    assert tokens.jwt_claims(token) == {}


def test_deep_claims_are_no_claims():
    deep = base64.urlsafe_b64encode(b"[" * 100000).decode()
    assert tokens.jwt_claims(f"a.{deep}.c") == {}


# the file


def test_the_rust_programs_file_loads_as_it_is():
    text = (
        '{\n  "access_token": "eyJ.a.b",\n  "refresh_token": "r",\n  "expires_at": 1780402551,\n'
        '  "token_endpoint": "https://auth.x.ai/oauth2/token"\n}'
    )
    login = tokens.from_json(text)
    assert login == tokens.Tokens(
        access_token="eyJ.a.b",
        refresh_token="r",
        expires_at=1780402551,
        token_endpoint="https://auth.x.ai/oauth2/token",
        issuer=config.DEFAULT_ISSUER,
        client_id=config.DEFAULT_CLIENT_ID,
    )


def test_a_login_survives_the_file_with_all_it_holds():
    login = make(
        scope="a b",
        account="a@b",
        token_endpoint="http://127.0.0.1/t",
        issuer="http://127.0.0.1",
        client_id="c",
        refresh_error=tokens.RefreshError("code", 'said "so"\n', 5.5, True, 7),
        extra={"theirs": {"deep": [1, None, "é\ud800"]}, "": 0},
    )
    assert tokens.from_json(login.to_json(None)) == login
    assert tokens.replaces(login.to_json("abc")) == "abc"


def test_the_file_says_every_key_and_keeps_unknown_ones():
    values = json.loads(make(extra={"theirs": 1}).to_json("mark"))
    assert list(values) == [*tokens.KEYS, "theirs"]
    assert (values["refresh_error"], values["replaces"], values["theirs"]) == (None, "mark", 1)


def test_without_expires_at_the_jwts_exp_counts():
    assert tokens.from_json(json.dumps({"access_token": jwt(exp=77)})).expires_at == 77
    with pytest.raises(ValueError, match="no expires_at"):
        tokens.from_json('{"access_token": "a"}')


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\xfd",
        b"{}",
        b'{"access_token": "a b", "expires_at": 1}',
        b"[" * 100000,
        b'{"access_token": "a", "expires_at": NaN}',
        b'{"access_token": "a", "expires_at": "1"}',
        b'{"access_token": "a", "expires_at": 1e999}',
        b'{"access_token": "a", "expires_at": 1780402551000}',
        b'{"access_token": "a", "expires_at": -1}',
        b'{"access_token": "a", "expires_at": 1, "refresh_token": 5}',
        b'{"access_token": "a", "expires_at": 1, "issuer": "\\u0000"}',
        b'{"access_token":"secret","expires_at":1}x',
        b"9" * 5000,
        b" " * 65536,
    ],
)
def test_a_file_that_is_no_login_is_a_value_error_that_repeats_no_value(text):
    with pytest.raises(ValueError, match="^(is|holds|says) ") as caught:
        tokens.from_json(text)
    assert "secret" not in str(caught.value) and len(str(caught.value)) < 100


@pytest.mark.parametrize(
    "members, scope",
    [
        ({"scope": ["api:access", "openid"]}, "api:access openid"),
        ({"scope": ["a", 1]}, None),
        ({"scope": "a\nb"}, None),
        ({"scope": 5}, None),
        ({"account": {}}, None),
        ({"token_endpoint": []}, None),
        ({"refresh_try": 5, "asked": "x"}, None),
    ],
)
def test_a_member_that_cannot_be_used_and_need_not_is_left_out(members, scope):
    login = tokens.from_json(json.dumps({"access_token": "a", "expires_at": 1, **members}))
    assert login == tokens.Tokens("a", 1, scope=scope)


def test_what_is_about_another_refresh_token_is_left_out():
    error = tokens.RefreshError(
        "invalid_grant", "gone", 5, terminal=True, token=tokens.fingerprint("refresh")
    )
    sent = tokens.RefreshTry(tokens.fingerprint("refresh"), 5, 2, 6)
    login = make(refresh_error=error, refresh_try=sent)
    assert tokens.from_json(login.to_json(None)) == login
    other = tokens.from_json(login.to_json(None).replace('"refresh"', '"another"'))
    assert (other.refresh_token, other.refresh_error, other.refresh_try) == ("another", None, None)
    unnamed = make(
        refresh_error=dataclasses.replace(error, token=None)
    )  # as earlier versions wrote it
    assert tokens.from_json(unnamed.to_json(None)) == unnamed


@pytest.mark.parametrize("value", [None, "text", [], 5])
def test_a_refresh_error_of_another_shape_is_none(value):
    text = json.dumps({"access_token": "a", "expires_at": 1, "refresh_error": value})
    assert tokens.from_json(text).refresh_error is None


def test_a_refresh_error_without_its_members_is_not_terminal():
    text = json.dumps(
        {
            "access_token": "a",
            "expires_at": 1,
            "refresh_error": {"terminal": "yes", "retry_at": "x"},
        }
    )
    assert tokens.from_json(text).refresh_error == tokens.RefreshError(
        "None", "None", 0, False, None
    )


def test_a_token_is_in_no_repr():
    assert "access" not in repr(make()).replace("access_token", "") and "refresh'" not in repr(
        make()
    )
    assert tokens.fingerprint("refresh") not in repr(make())


# what the API says of it


@pytest.mark.parametrize("name", [name for name, (status, *_) in ERRORS.items() if status == 403])
def test_only_a_dead_token_is_one_that_a_403_refuses(name):
    body = ERRORS[name][1]
    body = (body if isinstance(body, str) else json.dumps(body)).encode()
    assert tokens.is_refusal(body) is name.startswith("bad_credentials")

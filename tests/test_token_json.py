"""A login from a token response, and to and from the JSON of the token file."""

import base64
import dataclasses
import json
import re

import pytest

from xaiproxy import config, token_json, tokens

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


# from a token response


def test_expires_at_comes_from_expires_in_else_from_the_jwt_else_an_hour():
    def expiry(**response):
        return token_json.from_response({"access_token": "a", **response}, **FIELDS).expires_at

    assert expiry(expires_in=21600, access_token=jwt(exp=5)) == 22600
    assert expiry(expires_in="60") == 1060
    assert expiry(access_token=jwt(exp=4321)) == 4321
    assert expiry() == 4600
    for nonsense in (0, -1, None, "soon", True, [], float("nan"), float("inf"), "²"):
        assert expiry(expires_in=nonsense, access_token=jwt(exp=4321)) == 4321
    assert expiry(access_token=jwt(exp="never")) == 4600


@pytest.mark.parametrize("now", [1000, 864000])
def test_without_expires_in_the_lifetime_is_the_jwts_with_any_clock(now):
    fields = {**FIELDS, "now": now}
    assert (
        token_json.from_response({"access_token": jwt(iat=500000, exp=521600)}, **fields).expires_at
        == now + 21600
    )
    assert token_json.from_response({"access_token": jwt(iat=9, exp=5)}, **fields).expires_at == 5


def test_a_response_without_refresh_token_keeps_the_former_one():
    former = make(account="a@example.org", scope="one two", extra={"note": [1]})
    login = token_json.from_response({"access_token": "new"}, former=former, **FIELDS)
    assert (login.access_token, login.refresh_token) == ("new", "refresh")
    assert (login.account, login.scope, login.extra) == ("a@example.org", "one two", {"note": [1]})
    assert (login.issuer, login.client_id, login.token_endpoint, login.obtained_at) == (
        "https://auth.x.ai",
        "client",
        "https://auth.x.ai/t",
        1000,
    )


def test_a_response_clears_the_former_refresh_error():
    former = make(refresh_error=tokens.RefreshError("x", "y", 1))
    assert (
        token_json.from_response({"access_token": "new"}, former=former, **FIELDS).refresh_error
        is None
    )


def test_the_account_is_the_id_tokens_email():
    def account(**claims):
        return token_json.from_response(
            {"access_token": "a", "id_token": jwt(**claims)}, former=make(account="old@b"), **FIELDS
        ).account

    assert account(email="a@example.org") == "a@example.org"
    for nonsense in ("", "a\x1b[31m@b", "é@example.org", 5, None, "a" * 255):
        assert account(email=nonsense) == "old@b"


def test_a_sign_in_makes_a_salt_and_a_renewal_keeps_it():
    def salt(former=None):
        return token_json.from_response({"access_token": "a"}, former=former, **FIELDS).salt

    assert re.fullmatch("[0-9a-f]{32}", salt()) and salt() != salt()
    assert salt(make(salt="the salt")) == "the salt"
    # The file of another program.
    assert re.fullmatch("[0-9a-f]{32}", salt(make(salt=None)))


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
def test_an_unusable_response_is_a_value_error_that_repeats_no_value(response):
    with pytest.raises(ValueError, match="^holds (no|a) [a-z_]+ ") as caught:
        token_json.from_response(response, **FIELDS)
    assert "Evil" not in str(caught.value)


# the file


def test_a_file_of_the_rust_program_is_loaded():
    text = (
        '{\n  "access_token": "eyJ.a.b",\n  "refresh_token": "r",\n  "expires_at": 1780402551,\n'
        '  "token_endpoint": "https://auth.x.ai/oauth2/token"\n}'
    )
    login = token_json.from_json(text)
    assert login == tokens.Login(
        access_token="eyJ.a.b",
        refresh_token="r",
        expires_at=1780402551,
        token_endpoint="https://auth.x.ai/oauth2/token",
        issuer=config.DEFAULT_ISSUER,
        client_id=config.DEFAULT_CLIENT_ID,
    )


def test_a_login_survives_the_file_with_all_its_members():
    login = make(
        scope="a b",
        account="a@b",
        token_endpoint="http://127.0.0.1/t",
        issuer="http://127.0.0.1",
        client_id="c",
        salt="the salt",
        refresh_error=tokens.RefreshError("code", 'said "so"\n', 5.5, True, 7),
        extra={"theirs": {"deep": [1, None, "é\ud800"]}, "": 0},
    )
    assert token_json.from_json(token_json.to_json(login, None)) == login
    assert token_json.replaces(token_json.to_json(login, "abc")) == "abc"


def test_the_file_has_every_key_and_keeps_unknown_ones():
    values = json.loads(token_json.to_json(make(extra={"theirs": 1}), "mark"))
    assert list(values) == [*token_json.KEYS, "theirs"]
    assert (values["refresh_error"], values["replaces"], values["theirs"]) == (None, "mark", 1)


def test_without_expires_at_the_jwts_exp_is_the_expiry():
    assert token_json.from_json(json.dumps({"access_token": jwt(exp=77)})).expires_at == 77
    with pytest.raises(ValueError, match="has no expires_at"):
        token_json.from_json('{"access_token": "a"}')


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
    with pytest.raises(ValueError, match="^(is|holds|has) ") as caught:
        token_json.from_json(text)
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
def test_an_unusable_optional_member_is_ignored(members, scope):
    login = token_json.from_json(json.dumps({"access_token": "a", "expires_at": 1, **members}))
    assert login == tokens.Login("a", 1, scope=scope)


def test_members_about_another_refresh_token_are_ignored():
    error = tokens.RefreshError(
        "invalid_grant", "gone", 5, terminal=True, token=tokens.fingerprint("refresh")
    )
    sent = tokens.RefreshTry(tokens.fingerprint("refresh"), 5, 2, 6)
    login = make(refresh_error=error, refresh_try=sent)
    assert token_json.from_json(token_json.to_json(login, None)) == login
    other = token_json.from_json(token_json.to_json(login, None).replace('"refresh"', '"another"'))
    assert (other.refresh_token, other.refresh_error, other.refresh_try) == ("another", None, None)
    # As earlier versions wrote it.
    unnamed = make(refresh_error=dataclasses.replace(error, token=None))
    assert token_json.from_json(token_json.to_json(unnamed, None)) == unnamed


@pytest.mark.parametrize("value", [None, "text", [], 5])
def test_a_refresh_error_of_another_shape_is_none(value):
    text = json.dumps({"access_token": "a", "expires_at": 1, "refresh_error": value})
    assert token_json.from_json(text).refresh_error is None


def test_a_refresh_error_without_its_members_is_not_terminal():
    text = json.dumps(
        {
            "access_token": "a",
            "expires_at": 1,
            "refresh_error": {"terminal": "yes", "retry_at": "x"},
        }
    )
    assert token_json.from_json(text).refresh_error == tokens.RefreshError(
        "None", "None", 0, False, None
    )

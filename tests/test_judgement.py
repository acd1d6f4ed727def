"""The judgement of a login: a verdict, whether requests can be served, an exit code and a sentence."""

import re

import pytest

from xaiproxy import errors, judgement, tokens
from xaiproxy.judgement import Verdict
from xaiproxy.refresher_status import Status

NOW = 1_800_000_000.0
FAILED = tokens.RefreshError("issuer_unavailable", "the issuer is down", NOW - 5, retry_at=NOW + 5)
ENDED = tokens.RefreshError("invalid_grant", "revoked", NOW - 5, terminal=True)
FULL = "/a/tokens.json cannot be written: No space left on device. Make room on the disk"
NO_ROOM = Status(NOW, "storage", FULL, NOW + 1, FULL)
GONE = {"refresher_age": None}
EXPIRED = {"expires_at": NOW - 1}
TRY_AGAIN, SIGN_IN = errors.EXIT_TRY_AGAIN, errors.EXIT_SIGN_IN


def judge(
    expires_at=NOW + 7200,
    refresh_token="refresh",
    refresh_error=None,
    refresher_age=1.0,
    refused=False,
    status=None,
    elsewhere=False,
):
    about = tokens.Login("access", expires_at, refresh_token, refresh_error=refresh_error)
    return judgement.judge(about, NOW, refresher_age, refused, status, elsewhere=elsewhere)


CASES = {
    "good": ({}, Verdict.GOOD, True, 0, "^signed in$"),
    "failing": (
        {"refresh_error": FAILED},
        Verdict.FAILING,
        True,
        0,
        r"good until .* its renewal fails \(issuer_unavailable\)$",
    ),
    "failing, as only the refresher can report": (
        {"status": Status(NOW, "storage")},
        Verdict.FAILING,
        True,
        0,
        r"\(storage\)$",
    ),
    "last try good": (
        {"status": Status(NOW, "ok", next_try=NOW + 9)},
        Verdict.GOOD,
        True,
        0,
        "^signed in$",
    ),
    "no room": (
        {"status": NO_ROOM},
        Verdict.NO_ROOM,
        True,
        0,
        r"good until .* UTC, but no renewed login can be saved \(No space left on device\)$",
    ),
    "no room, expired": (
        {"status": NO_ROOM, **EXPIRED},
        Verdict.NO_ROOM,
        False,
        TRY_AGAIN,
        r"no renewed login can be saved \(No space left on device\)$",
    ),
    "no refresher": (GONE, Verdict.NO_REFRESHER, True, 0, "^no refresher; the login lapses at "),
    "refresher long gone": (
        {"refresher_age": 61},
        Verdict.NO_REFRESHER,
        True,
        0,
        "^no refresher; ",
    ),
    "no refresher, expired": (
        {**GONE, **EXPIRED},
        Verdict.NO_REFRESHER,
        False,
        TRY_AGAIN,
        "no refresher runs$",
    ),
    "no refresher, refused": (
        {**GONE, "refused": True},
        Verdict.NO_REFRESHER,
        False,
        TRY_AGAIN,
        "^the API refuses .* no refresher",
    ),
    "no refresh token": (
        {"refresh_token": None, **GONE},
        Verdict.NO_REFRESH_TOKEN,
        True,
        0,
        "lapses at",
    ),
    "no refresh token, expired": (
        {"refresh_token": None, **EXPIRED},
        Verdict.NO_REFRESH_TOKEN,
        False,
        SIGN_IN,
        "sign in, or replace",
    ),
    "no refresh token, refused": (
        {"refresh_token": None, "refused": True},
        Verdict.NO_REFRESH_TOKEN,
        False,
        SIGN_IN,
        "^the API refuses",
    ),
    "renewed elsewhere": (
        {"refresh_token": None, "elsewhere": True, **GONE},
        Verdict.GOOD,
        True,
        0,
        "^signed in$",
    ),
    "renewed elsewhere, expired": (
        {"refresh_token": None, "elsewhere": True, **GONE, **EXPIRED},
        Verdict.EXPIRED,
        False,
        TRY_AGAIN,
        "expired at .* UTC and has not been renewed yet$",
    ),
    "renewed elsewhere, refused": (
        {"refresh_token": None, "elsewhere": True, **GONE, "refused": True},
        Verdict.REFUSED,
        False,
        TRY_AGAIN,
        "^the API refuses the access token, which has not been renewed yet$",
    ),
    "renewed elsewhere, ended": (
        {"refresh_token": None, "elsewhere": True, "refresh_error": ENDED, **GONE},
        Verdict.ENDED,
        True,
        SIGN_IN,
        "has ended",
    ),
    "renewed here though another refresher is known": (
        {"elsewhere": True, **GONE},
        Verdict.NO_REFRESHER,
        True,
        0,
        "^no refresher; ",
    ),
    "refused": (
        {"refused": True},
        Verdict.REFUSED,
        False,
        TRY_AGAIN,
        "^the API refuses the access token, which has not been renewed yet$",
    ),
    "refused, failing": (
        {"refused": True, "refresh_error": FAILED},
        Verdict.REFUSED,
        False,
        TRY_AGAIN,
        "cannot be renewed",
    ),
    "expired": (
        EXPIRED,
        Verdict.EXPIRED,
        False,
        TRY_AGAIN,
        "expired at .* UTC and has not been renewed yet$",
    ),
    "expired, failing": (
        {**EXPIRED, "refresh_error": FAILED},
        Verdict.EXPIRED,
        False,
        TRY_AGAIN,
        "cannot be renewed",
    ),
    "ended": (
        {"refresh_error": ENDED},
        Verdict.ENDED,
        True,
        SIGN_IN,
        r"good until .* has ended \(invalid_grant\); run `",
    ),
    "ended, expired": (
        {"refresh_error": ENDED, **EXPIRED},
        Verdict.ENDED,
        False,
        SIGN_IN,
        "^the login has ended",
    ),
    "ended, refused": (
        {"refresh_error": ENDED, "refused": True},
        Verdict.ENDED,
        False,
        SIGN_IN,
        "^the API refuses .* has ended",
    ),
    "ended, no refresher": (
        {"refresh_error": ENDED, **GONE},
        Verdict.ENDED,
        True,
        SIGN_IN,
        "has ended",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_judgement_of_a_login(case):
    members, verdict, ready, exit_code, reason = CASES[case]
    found = judge(**members)
    assert (found.verdict, found.ready, found.exit_code) == (verdict, ready, exit_code)
    assert re.search(reason, found.reason)


@pytest.mark.parametrize(
    "state, verdict, exit_code",
    [("missing", Verdict.NO_LOGIN, SIGN_IN), ("corrupt", Verdict.UNUSABLE, SIGN_IN)],
)
def test_the_judgement_of_a_file_that_is_no_login(state, verdict, exit_code):
    found = judgement.judge(errors.LoginUnusable(state, "/path"), NOW, 1.0, False, None)
    assert (found.verdict, found.ready, found.exit_code) == (verdict, False, exit_code)
    assert "/path" not in found.reason


def test_the_judgement_of_a_file_that_cannot_be_read():
    found = judgement.judge(errors.LoginUnread("/path"), NOW, 1.0, False, None)
    assert (found.verdict, found.ready, found.exit_code) == (Verdict.UNREAD, False, TRY_AGAIN)
    assert "/path" not in found.reason


def test_the_issuers_description_is_not_in_the_public_sentence():
    error = tokens.RefreshError("<b>x</b>\x1b[2J", "a secret", NOW, retry_at=None)
    assert judge(refresh_error=error).reason.endswith("its renewal fails (unknown error)")

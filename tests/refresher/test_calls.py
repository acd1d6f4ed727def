"""Which call for a person is due, with times that the test sets."""

import dataclasses

import pytest

from xaiproxy import errors, tokens
from xaiproxy.refresher import calls
from xaiproxy.refresher.calls import RECOVERED, RENEWAL_FAILING, SIGN_IN_NEEDED, Record
from xaiproxy.refresher_status import Status

# A lifetime of six hours, stale at 18280.
LOGIN = tokens.Login("access", expires_at=22600, refresh_token="refresh", obtained_at=1000)
NEXT = dataclasses.replace(LOGIN, access_token="next", expires_at=41000, obtained_at=19400)
ENDED = dataclasses.replace(
    LOGIN, refresh_error=tokens.RefreshError("invalid_grant", "refused", 18300, terminal=True)
)
FAILING = dataclasses.replace(
    LOGIN, refresh_error=tokens.RefreshError("issuer_unavailable", "down", 18300, retry_at=18310)
)
SECRET = dataclasses.replace(LOGIN, refresh_token=None)
CORRUPT = errors.LoginUnusable("corrupt", "/secret/path is not JSON")


IDLE = Status(0.0)


class Watch:
    """The calls of one refresher, each delivered at once. `sent`: (time, event)."""

    def __init__(self):
        self.record = Record()
        self.sent = []
        self.messages = []

    def see(self, login, *times, status=IDLE):
        for now in times:
            found = calls.find(login, status, now, 120)
            self.record, call = calls.plan(self.record, found, now)
            if call is not None:
                self.record = calls.delivered(self.record, call)
                self.sent.append((call.at, call.event))
                self.messages.append(call.message)
        return self


@pytest.fixture
def watch():
    return Watch()


def test_a_login_that_works_or_was_never_there_causes_no_call(watch):
    missing = errors.LoginUnusable("missing", "not signed in")
    watch.see(missing, 2000, 9000).see(LOGIN, 9001, 18279).see(NEXT, 19400).see(missing, 20000)
    assert watch.sent == [] and watch.record == Record()


def test_an_ended_login_causes_one_call_and_its_successor_another(watch):
    watch.see(LOGIN, 18279).see(ENDED, 18300, 18301, 23000).see(NEXT, 23001, 23002)
    assert watch.sent == [(18300, SIGN_IN_NEEDED), (23001, RECOVERED)]
    assert watch.messages[0].endswith(
        "but the login has ended (invalid_grant); run `xai-login --device` to sign in."
    )
    assert watch.record == Record()


def test_renewal_that_fails_causes_a_call_after_half_of_what_was_left(watch):
    # 4300 s are left.
    watch.see(FAILING, 18300, 18310, 20449)
    assert watch.sent == []
    watch.see(FAILING, 20450, 21000, 23000).see(NEXT, 23100)
    assert watch.sent == [(20450, RENEWAL_FAILING), (23100, RECOVERED)]
    assert "its renewal fails (issuer_unavailable)" in watch.messages[0]


def test_renewal_that_works_again_before_that_causes_no_call(watch):
    watch.see(FAILING, 18300, 20449).see(NEXT, 20449)
    assert watch.sent == [] and watch.record == Record()


def test_renewal_that_fails_after_expiry_causes_a_call_at_once(watch):
    assert watch.see(FAILING, 22600).sent == [(22600, RENEWAL_FAILING)]


def test_an_expired_token_causes_no_call_before_its_renewal_has_failed(watch):
    assert watch.see(LOGIN, 22600, 30000).sent == []


def test_a_login_that_ends_after_failures_is_another_trouble_with_one_recovery(watch):
    watch.see(FAILING, 18300, 20450).see(ENDED, 20500, 20501).see(NEXT, 21000, 21001)
    assert [event for _, event in watch.sent] == [RENEWAL_FAILING, SIGN_IN_NEEDED, RECOVERED]


def test_a_second_login_that_ends_unseen_causes_a_call_of_its_own(watch):
    second = dataclasses.replace(ENDED, access_token="second")
    watch.see(ENDED, 18300).see(second, 18400, 18500)
    assert watch.sent == [(18300, SIGN_IN_NEEDED), (18400, SIGN_IN_NEEDED)]


def test_a_restart_with_a_full_disk_is_no_recovery(watch):
    mark = tokens.fingerprint("access")
    full = Status(0.0, "storage", "the disk is full", no_room="no room", login=mark)
    watch.see(LOGIN, 18300, 20450, status=full)
    # A new refresher has not tried yet; nothing of the failure is in tokens.json.
    watch.see(LOGIN, 20451, status=Status(0.0, login=mark)).see(LOGIN, 20452, 22600, status=full)
    assert watch.sent == [(20450, RENEWAL_FAILING)]
    assert watch.see(NEXT, 22700, status=full).sent[1:] == [(22700, RECOVERED)]


def test_a_mounted_login_causes_a_call_when_it_has_expired(watch):
    watch.see(SECRET, 22599).see(SECRET, 22600, 22700)
    watch.see(dataclasses.replace(SECRET, access_token="next", expires_at=50000), 22800)
    assert watch.sent == [(22600, SIGN_IN_NEEDED), (22800, RECOVERED)]


def test_a_file_that_is_unusable_for_a_moment_causes_no_call(watch):
    assert watch.see(CORRUPT, 2000, 2009).see(LOGIN, 2009.5).see(CORRUPT, 2011).sent == []
    watch.see(CORRUPT, 2021, 2030).see(errors.LoginUnusable("foreign", "another"), 2040)
    assert watch.sent == [(2021, SIGN_IN_NEEDED)]
    assert "/secret/path" not in watch.messages[0]


def test_a_file_that_cannot_be_read_at_the_moment_changes_nothing(watch):
    unread = errors.LoginUnread("no descriptors")
    assert watch.see(unread, 1, 9000).sent == []
    watch.see(ENDED, 18300).see(unread, 18400, 18500).see(ENDED, 18600)
    assert watch.sent == [(18300, SIGN_IN_NEEDED)]


def test_a_clock_that_is_set_back_makes_no_trouble_last_longer(watch):
    watch.see(FAILING, 20000).see(FAILING, 18000, 20299)
    assert watch.sent == []
    assert watch.see(FAILING, 20300).sent == [(20300, RENEWAL_FAILING)]


def test_no_recovery_is_due_without_a_delivered_call():
    record, call = calls.plan(Record(), calls.find(ENDED, IDLE, 18300, 120), 18300)
    assert call is not None
    # It was not delivered.
    assert calls.plan(record, calls.find(NEXT, IDLE, 19400, 120), 19400) == (Record(), None)

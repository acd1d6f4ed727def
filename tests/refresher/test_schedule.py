"""When the refresh token is sent: every decision, with clocks that the test sets."""

import dataclasses
import math

import pytest

from xaiproxy import errors, token_json, tokens
from xaiproxy.refresher.schedule import Decision, Schedule

NOTHING, REFRESH, DECLINE = Decision.NOTHING, Decision.REFRESH, Decision.DECLINE
# A lifetime of six hours, stale at 18280.
LOGIN = tokens.Login("access", expires_at=22600, refresh_token="refresh", obtained_at=1000)
UNAVAILABLE = errors.IssuerUnavailable("down")
# Of a token that may be spent.
LAST_TRY_AT = 22000
LOST = errors.IssuerUnavailable("lost", sent=True)


def reread(login: tokens.Login) -> tokens.Login:
    return token_json.from_json(token_json.to_json(login, None))


class Desk:
    """A schedule and its two clocks, which start at different times."""

    def __init__(self, login: tokens.Login = LOGIN, jitter: float = 0.0):
        self.schedule = Schedule(120, lambda: jitter)
        self.jitter = jitter
        self.now, self.uptime, self.login = 2000.0, 50.0, login

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.uptime += seconds

    def decide(self, asked: bool = False) -> Decision:
        self.schedule.watch(self.login, self.now, self.uptime)
        return self.schedule.decide(self.login, asked, self.now, self.uptime)

    def fail(
        self, error: errors.Error, took: float = 0.0, asked: bool = False, killed: bool = False
    ) -> float | None:
        """Make one try that fails, as the refresher does; return the seconds to the next.

        `killed`: the process is killed with SIGKILL in the middle of the request.
        """
        self.schedule.watch(self.login, self.now, self.uptime)
        before, begun = self.login, self.schedule.begun(self.login, asked, self.now, self.uptime)
        self.login = self.begun = reread(begun)
        self.pass_(took)
        if killed:
            self.restart()
            return None
        failed, record = self.schedule.failed(error, before, begun, self.now, self.uptime)
        self.login = reread(failed)
        assert self.login.refresh_error == record
        return None if record.retry_at is None else record.retry_at - self.now

    def restart(self) -> None:
        """Start another process, which knows only the file."""
        self.schedule = Schedule(120, lambda: self.jitter)

    def succeed(self, asked: bool = False, lifetime: float = 21600) -> float | None:
        number = int(self.login.access_token.removeprefix("access") or 0) + 1
        self.schedule.watch(self.login, self.now, self.uptime)
        begun = self.schedule.begun(self.login, asked, self.now, self.uptime)
        successor = tokens.Login(
            f"access{number}",
            refresh_token=f"refresh{number}",
            obtained_at=self.now,
            expires_at=self.now + lifetime,
        )
        self.login = reread(self.schedule.succeeded(successor, begun, asked, self.now, self.uptime))
        return self.login.refresh_error and self.login.refresh_error.retry_at - self.now

    def wait_until_due(
        self, limit: float = 100000, asked: bool = False, step: float = 0.25
    ) -> float:
        begin = self.uptime
        while self.decide(asked) is not REFRESH:
            self.pass_(step)
            assert self.uptime - begin < limit
        return self.uptime - begin


@pytest.fixture
def desk():
    return Desk()


@pytest.fixture
def stale():
    desk = Desk()
    desk.now = 18281.0
    return desk


# when a refresh is due


def test_a_refresh_is_due_when_the_token_is_stale_and_not_before(desk):
    desk.now = 18280
    assert desk.decide() is NOTHING
    desk.now = 18280.1
    assert desk.decide() is REFRESH
    desk.now = 30000
    assert desk.decide() is REFRESH


def test_nothing_is_due_for_a_login_without_refresh_token():
    desk = Desk(dataclasses.replace(LOGIN, refresh_token=None))
    desk.now = 30000
    assert desk.decide() is desk.decide(asked=True) is NOTHING


def test_a_changed_wall_clock_decides_whether_a_refresh_is_due(desk):
    assert desk.decide() is NOTHING
    # Set forward, or the machine was suspended.
    desk.now = 20000
    assert desk.decide() is REFRESH
    # Set back, before the token was issued.
    desk.now = 500
    assert desk.decide() is NOTHING


def test_an_asked_refresh_is_due_at_any_time_of_day(desk):
    desk.now = 500
    assert desk.decide(asked=True) is REFRESH


# failures that spend no token


def test_backoff_doubles_from_one_second_to_sixty(stale):
    waits = []
    for _ in range(9):
        waits.append(stale.fail(UNAVAILABLE))
        assert stale.wait_until_due() == waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize("error", [UNAVAILABLE, errors.StorageError("full")])
def test_backoff_ends_ten_seconds_after_expiry_at_the_latest(stale, error):
    stale.now = LOGIN.expires_at - 100
    assert [stale.fail(error) for _ in range(7)][-1] == 60
    stale.now = LOGIN.expires_at - 7
    assert [stale.fail(error) for _ in range(2)] == [17, 17]
    stale.now = LOGIN.expires_at + 1000
    assert [stale.fail(error) for _ in range(2)] == [10, 10]
    assert stale.wait_until_due() == 10


def test_retry_after_holds_after_expiry_too(stale):
    stale.now = LOGIN.expires_at + 1000
    assert stale.fail(errors.IssuerUnavailable("busy", retry_after=40)) == 40


def test_backoff_is_measured_on_the_monotonic_clock(stale):
    for _ in range(7):
        stale.fail(UNAVAILABLE)
    stale.now -= 5000
    stale.now += 5000
    stale.uptime += 59.9
    assert stale.decide() is NOTHING
    stale.uptime += 0.2
    assert stale.decide() is REFRESH


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
def test_backoff_is_jittered_down_to_a_half(jitter):
    desk = Desk(jitter=jitter)
    desk.now = 20000
    assert [desk.fail(UNAVAILABLE) for _ in range(3)] == pytest.approx(
        [wait * (1 - jitter / 2) for wait in (1, 2, 4)]
    )
    assert 0.5 <= Desk(jitter=jitter).fail(UNAVAILABLE) <= 1


@pytest.mark.parametrize(
    "retry_after, wait", [(0.0, 1), (0.5, 1), (17.0, 17), (300.0, 300), (301.0, 300), (1e9, 300)]
)
def test_retry_after_sets_the_next_try_up_to_five_minutes(stale, retry_after, wait):
    assert stale.fail(errors.IssuerUnavailable("busy", retry_after=retry_after)) == wait


def test_a_full_disk_backs_off(stale):
    assert [stale.fail(errors.StorageError("full")) for _ in range(3)] == [1, 2, 4]


@pytest.mark.parametrize(
    "error", [errors.ClientRejected("invalid_client"), errors.NotEntitled("access_denied")]
)
def test_a_refused_client_or_plan_is_retried_every_five_minutes(stale, error):
    for _ in range(3):
        assert stale.fail(error) == 300
        assert stale.decide(asked=True) is NOTHING
        assert stale.wait_until_due() == 300


def test_hurry_ends_the_wait(stale):
    stale.fail(errors.NotEntitled("access_denied"))
    stale.schedule.hurry()
    assert stale.decide() is REFRESH


def test_success_ends_the_backoff(stale):
    for _ in range(5):
        stale.fail(UNAVAILABLE)
    assert stale.succeed() is None and stale.schedule.failures == 0
    assert stale.wait_until_due(step=1) == pytest.approx(21600 * 4 / 5, abs=2)
    assert stale.fail(UNAVAILABLE) == 1


def test_a_token_that_is_stale_at_once_backs_off_like_a_failure(stale):
    waits = [stale.succeed(lifetime=-5) for _ in range(9)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert stale.decide() is NOTHING
    assert stale.wait_until_due() == 60
    assert stale.succeed() is None and stale.schedule.failures == 0


# lost responses


def test_a_lost_response_gets_three_tries_and_one_ten_minutes_before_expiry(stale):
    assert stale.fail(LOST) == 1
    assert stale.wait_until_due() == 1
    assert stale.fail(LOST) == 2
    assert stale.wait_until_due() == 2
    assert stale.fail(LOST) == LAST_TRY_AT - stale.now
    stale.uptime += 10000
    stale.now = LAST_TRY_AT - 0.1
    assert stale.decide() is NOTHING
    stale.now += 0.1
    assert stale.decide() is REFRESH
    waits = [stale.fail(LOST) for _ in range(6)]
    # Then backoff, and no more counting.
    assert waits == [8, 16, 32, 60, 60, 60]
    assert stale.wait_until_due() == 60


def test_the_last_try_of_a_short_token_is_a_tenth_of_its_lifetime_before_expiry():
    # A lifetime of an hour.
    desk = Desk(dataclasses.replace(LOGIN, expires_at=4600))
    desk.now = 3900.0
    for _ in range(3):
        desk.fail(LOST)
    assert desk.login.refresh_error.retry_at == 4600 - 360


@pytest.mark.parametrize("took, next_at", [(29, 29 + 1), (29.1, LAST_TRY_AT - 18281)])
def test_a_lost_response_is_not_retried_after_thirty_seconds(stale, took, next_at):
    assert took + stale.fail(LOST, took=took) == pytest.approx(next_at)


def test_a_retry_that_begins_late_is_not_made(stale):
    stale.fail(LOST, took=29)
    assert stale.wait_until_due() == 1
    stale.pass_(0.1)
    # 30.1 s after the first was sent.
    assert stale.decide() is NOTHING


def test_a_killed_process_and_its_successors_send_a_token_three_times(stale):
    for tries in (1, 2, 3):
        assert stale.wait_until_due() == (0, 1, 1)[tries - 1]
        stale.fail(LOST, killed=True)
        assert stale.login.refresh_try.tries == tries
    stale.pass_(100)
    assert stale.decide() is NOTHING
    stale.now = LAST_TRY_AT
    assert stale.wait_until_due() == 0


def test_three_refreshers_of_one_login_send_a_token_three_times_together(stale):
    sent = []
    others = [Desk(), Desk()]
    while stale.now < LAST_TRY_AT:
        for other in others:
            other.now, other.uptime, other.login = stale.now, stale.now + 77, stale.login
        for desk in (stale, *others):
            if desk.decide() is REFRESH:
                desk.fail(LOST)
                sent.append(stale.now)
                for each in (stale, *others):
                    each.login = desk.login
        stale.pass_(1)
    assert sent == [18281, 18282, 18284]


@pytest.mark.parametrize("step", [10000, -10000])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_change_between_two_tries_allows_no_fourth(stale, step, restarted):
    stale.fail(LOST)
    stale.now += step
    stale.login = dataclasses.replace(
        stale.login, obtained_at=stale.now - 8000, expires_at=stale.now + 1900
    )
    if restarted:
        stale.restart()
    tries = 1
    for _ in range(600):
        stale.pass_(1)
        if stale.decide() is REFRESH:
            stale.fail(LOST)
            tries += 1
    assert tries == (1 if restarted else 3)


def test_a_suspended_machine_does_not_retry(stale):
    stale.fail(LOST)
    stale.uptime += 8 * 3600
    stale.now += 100
    assert stale.decide() is NOTHING


def test_a_definite_failure_after_a_lost_response_does_not_make_the_token_safe(stale):
    stale.fail(LOST)
    stale.pass_(1)
    assert stale.fail(errors.IssuerUnavailable("busy", retry_after=60)) == LAST_TRY_AT - stale.now
    assert stale.login.refresh_try.tries == 1
    stale.pass_(60)
    assert stale.decide() is NOTHING


def test_a_lost_response_with_an_expired_token_backs_off(stale):
    stale.now = LOGIN.expires_at
    assert [stale.fail(LOST) for _ in range(5)] == [1, 2, 4, 8, 16]


def test_a_lost_response_is_retried_when_upstream_refuses_the_token(stale):
    for _ in range(3):
        stale.fail(LOST)
    stale.pass_(1)
    # This is still within the backoff.
    assert (stale.decide(), stale.decide(asked=True)) == (
        NOTHING,
        NOTHING,
    )
    stale.pass_(3)
    assert (stale.decide(), stale.decide(asked=True)) == (NOTHING, REFRESH)
    stale.fail(LOST)
    assert stale.decide(asked=True) is NOTHING
    assert stale.wait_until_due(asked=True) == 8


@pytest.mark.parametrize("ago, decision", [(-1, NOTHING), (29, REFRESH), (31, NOTHING)])
def test_a_response_lost_by_an_earlier_process_is_known_from_the_file(ago, decision):
    desk = Desk()
    desk.now = 18281.0
    lost = tokens.RefreshTry(tokens.fingerprint("refresh"), desk.now - ago, 1, desk.now - ago)
    desk.login = dataclasses.replace(LOGIN, refresh_try=lost)
    desk.decide()
    # The wait for a try that is in the future.
    desk.uptime += 1
    assert desk.decide() is decision
    desk.now = LAST_TRY_AT
    assert desk.decide() is REFRESH


# refused grants


def test_a_refused_grant_is_not_retried(stale):
    assert stale.fail(errors.GrantRefused("invalid_grant")) is None
    stale.schedule.hurry()
    stale.now += 1e6
    stale.uptime += 1e6
    assert stale.decide() is stale.decide(asked=True) is NOTHING


def test_a_refusal_recorded_by_an_earlier_process_holds(stale):
    stale.login = dataclasses.replace(
        LOGIN, refresh_error=tokens.RefreshError("invalid_grant", "", 5, terminal=True)
    )
    assert stale.decide() is stale.decide(asked=True) is NOTHING


@pytest.mark.parametrize(
    "error", [errors.GrantRefused("invalid_grant"), UNAVAILABLE, LOST, errors.NotEntitled("denied")]
)
@pytest.mark.parametrize("new", [{"refresh_token": "another"}, {"access_token": "another"}])
def test_a_new_login_clears_the_failures_of_the_old_one(stale, error, new):
    for _ in range(3):
        stale.fail(error)
    assert stale.decide() is NOTHING
    assert stale.schedule.watch(stale.login, stale.now, stale.uptime) is False
    stale.login = dataclasses.replace(stale.login, refresh_error=None, refresh_try=None, **new)
    assert stale.schedule.watch(stale.login, stale.now, stale.uptime) is True
    assert stale.decide() is REFRESH
    assert stale.fail(UNAVAILABLE) == 1


def doubted(word: str) -> errors.GrantRefused:
    error = errors.GrantRefused(word)
    error.certain = False
    return error


def test_a_refusal_that_is_not_the_rfcs_ends_the_login_at_the_third_in_a_row(stale):
    assert [stale.fail(doubted("token_expired")) for _ in range(3)] == [1, 2, None]
    assert stale.login.refresh_error.terminal
    stale.now += 1e6
    stale.uptime += 1e6
    assert stale.decide() is NOTHING


def test_such_refusals_are_counted_by_all_refreshers_together_and_only_in_a_row(stale):
    for error in (
        doubted("token_expired"),
        UNAVAILABLE,
        doubted("token_expired"),
        doubted("token_revoked"),
        doubted("token_expired"),
        doubted("token_expired"),
    ):
        assert stale.fail(error) is not None
        stale.restart()
    assert stale.fail(doubted("token_expired")) is None


def test_a_lasting_refusal_after_expiry_advises_to_sign_in_and_is_retried(stale):
    unknown = errors.IssuerUnavailable("HTTP 400: no_idea", refused=True)
    descriptions = []
    for now in (18281, 18300, 18400, LOGIN.expires_at + 5, LOGIN.expires_at + 99):
        stale.now = now
        assert stale.fail(unknown) is not None
        descriptions.append(stale.login.refresh_error.description)
    assert descriptions[:3] == ["HTTP 400: no_idea"] * 3
    assert descriptions[3:] == [f"HTTP 400: no_idea; if that lasts, {errors.SIGN_IN}"] * 2


def test_a_refusal_of_one_refresh_token_does_not_block_another(stale):
    stale.fail(errors.GrantRefused("invalid_grant"))
    assert stale.decide() is NOTHING
    # Edited by hand: all else stays.
    stale.login = reread(dataclasses.replace(stale.login, refresh_token="another"))
    assert stale.decide() is REFRESH


def test_the_backoff_of_another_refresher_holds_too(stale):
    for error, wait in (
        (UNAVAILABLE, 1),
        (UNAVAILABLE, 2),
        (errors.NotEntitled("denied"), 300),
        (UNAVAILABLE, 8),
    ):
        stale.fail(error)
        stale.restart()
        assert stale.wait_until_due() == wait


def test_a_definite_response_that_cannot_be_recorded_counts_as_no_try(stale):
    for wait in (1, 2, 4, 8, 16):
        assert stale.fail(UNAVAILABLE) == wait
        assert stale.login.refresh_try is None
        # What was written before the token was sent.
        stale.login = stale.begun
        stale.pass_(wait)
    assert stale.decide() is REFRESH


def test_a_wait_in_the_file_is_bounded_by_its_own_limit(desk):
    far = desk.now + 1e6
    failed = tokens.RefreshError("issuer_unavailable", "", desk.now, retry_at=far)
    desk.login = dataclasses.replace(LOGIN, expires_at=desk.now + 10, refresh_error=failed)
    assert desk.wait_until_due() == 300
    lost = tokens.RefreshTry(tokens.fingerprint("refresh"), desk.now, 1, far)
    desk.login = dataclasses.replace(desk.login, refresh_error=None, refresh_try=lost)
    assert desk.wait_until_due() == 60
    desk.login = dataclasses.replace(
        LOGIN, obtained_at=desk.now, expires_at=desk.now + 99999, asked=tokens.Asked(far, 240)
    )
    assert desk.wait_until_due(asked=True) == 240
    desk.login = dataclasses.replace(desk.login, asked=tokens.Asked(far, 1e6))
    assert desk.wait_until_due(asked=True) == 3600


def test_a_backoff_from_before_the_clock_was_set_back_is_ignored(stale):
    failed = tokens.RefreshError(
        "issuer_unavailable", "", stale.now + 3600, retry_at=stale.now + 3660
    )
    stale.login = dataclasses.replace(stale.login, refresh_error=failed)
    assert stale.decide() is REFRESH


def test_a_failure_that_could_not_be_recorded_is_remembered(stale):
    for wait in (1, 2, 4, 8):
        before = stale.login
        assert stale.fail(UNAVAILABLE) == wait
        # The disk is full.
        stale.login = before
        assert stale.wait_until_due() == wait


# refreshes that the proxy asks for


def test_asked_refreshes_come_at_most_once_in_two_minutes_doubling_to_an_hour(desk):
    waits = []
    for _ in range(8):
        waits.append(desk.wait_until_due(asked=True, step=1))
        desk.succeed(asked=True)
    assert waits == [0, 120, 240, 480, 960, 1920, 3600, 3600]


def test_an_asked_refresh_that_comes_too_early_is_declined_once(desk):
    desk.succeed(asked=True)
    desk.pass_(20)
    assert desk.decide() is NOTHING
    assert desk.decide(asked=True) is DECLINE
    assert desk.schedule.asked_wait(desk.uptime) == 100
    assert (
        desk.schedule.declined(
            desk.login, "too early", desk.now, desk.uptime
        ).refresh_error.retry_at
        == desk.now + 100
    )
    assert desk.decide(asked=True) is NOTHING
    desk.pass_(99.9)
    assert desk.decide(asked=True) is NOTHING
    desk.pass_(0.2)
    assert desk.decide(asked=True) is REFRESH
    desk.succeed(asked=True)
    assert desk.decide(asked=True) is DECLINE


def test_an_asked_refresh_is_not_declined_when_the_file_has_a_failure(desk):
    desk.succeed(asked=True)
    desk.login = dataclasses.replace(desk.login, refresh_error=tokens.RefreshError("x", "", 5))
    assert desk.decide(asked=True) is NOTHING


def test_the_wait_is_two_minutes_again_after_a_refreshed_token_has_lasted(desk):
    for _ in range(4):
        desk.wait_until_due(asked=True, step=1)
        desk.succeed(asked=True)
    desk.wait_until_due(step=1)
    desk.succeed()
    assert desk.wait_until_due(asked=True) == 0
    desk.succeed(asked=True)
    assert desk.wait_until_due(asked=True) == 120


def test_a_token_that_is_refused_and_stale_has_not_lasted(desk):
    desk.succeed(asked=True, lifetime=100)
    desk.wait_until_due(asked=True)
    desk.succeed(asked=True)
    assert desk.wait_until_due(asked=True) == 240


def test_a_new_login_may_be_refreshed_at_once_when_it_is_refused(desk):
    for _ in range(4):
        desk.wait_until_due(asked=True, step=1)
        desk.succeed(asked=True)
    desk.login = dataclasses.replace(desk.login, refresh_token="another", asked=None)
    assert desk.decide(asked=True) is REFRESH


@pytest.mark.parametrize("step", [0, 86400, -86400])
def test_the_limit_of_asked_refreshes_holds_for_all_refreshers_and_restarts(desk, step):
    refreshes = 0
    for second in range(600):
        desk.restart()
        if desk.decide(asked=True) is REFRESH:
            desk.succeed(asked=True)
            refreshes += 1
        desk.pass_(1)
        if second == 300:
            desk.now += step
    assert refreshes == (3 if step >= 0 else 2)


def test_the_limit_of_asked_refreshes_survives_a_kill_in_the_request(desk):
    desk.fail(LOST, asked=True, killed=True)
    desk.succeed(asked=True)
    assert desk.login.asked.wait == 120 and desk.login.refresh_try is None
    desk.restart()
    assert desk.wait_until_due(asked=True) == 120


def test_an_asked_refresh_whose_response_is_lost_is_retried_like_any_other(desk):
    for wait in (1, 2):
        assert desk.fail(LOST, asked=True) == wait
        assert desk.wait_until_due(asked=True) == wait
    desk.fail(LOST, asked=True)
    desk.restart()
    assert desk.wait_until_due(asked=True) == 4 and desk.login.asked.wait == 120


def test_an_asked_refresh_that_spent_nothing_may_be_made_again_after_the_backoff(desk):
    assert desk.fail(UNAVAILABLE, asked=True) == 1
    desk.restart()
    assert desk.wait_until_due(asked=True) == 1


def test_an_asked_refresh_waits_for_the_backoff(desk):
    assert desk.decide(asked=True) is REFRESH
    desk.fail(UNAVAILABLE)
    assert desk.decide(asked=True) is NOTHING
    assert desk.wait_until_due(asked=True) == 1


def test_no_wait_is_ever_endless_or_negative(stale):
    for error in (UNAVAILABLE, LOST, errors.IssuerUnavailable("x", retry_after=math.inf)):
        for _ in range(500):
            wait = stale.fail(error)
            assert 0.5 <= wait <= (300 if error is UNAVAILABLE else LAST_TRY_AT)

"""The refresher's loop in this process, with clocks that run only while it waits, so that hours
pass in a moment.

The issuer is the sandbox, over real sockets; the lock and the file are real. Its processes:
test_running.py.
"""

import base64
import contextlib
import itertools
import json
import logging
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from xaiproxy import (
    config,
    errors,
    judgement,
    refresher_status,
    token_json,
    token_lock,
    token_writer,
    tokens,
)
from xaiproxy.refresher import process as refresher
from xaiproxy.token_store import TokenStore
from xaiproxy.tokens import State, fingerprint

TOKEN_ENDPOINT = "/oauth2/token"


class Day:
    """A refresher and its day.

    `failures` are those that were recorded in the file: (seconds since the start, error).
    """

    def __init__(self, sandbox, folder, clock_error: float = 0.0, **settings):
        environ = {**sandbox.env, "XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json"), **settings}
        self.sandbox = sandbox
        self.settings = config.from_environ(environ, dotenv_path=os.devnull)
        self.store = TokenStore(self.settings)
        self.path = self.settings.token_path
        self.failures: list[tuple[float, tokens.RefreshError]] = []
        self._begin = time.time() + clock_error
        self.start()

    def start(self) -> None:
        """A new process, as far as its memory goes."""
        self.uptime = 0.0
        self.during_pause = lambda: None
        self.refresher = refresher.Refresher(
            self.settings, clock=self.now, uptime=lambda: self.uptime, sleep=self._sleep
        )
        self.refresher.begin()

    def now(self) -> float:
        return self._begin + self.uptime

    def _sleep(self, seconds: float) -> None:
        self.uptime += seconds
        self.during_pause()

    def sign_in(self, **members) -> dict:
        """A login written by another process, with the lock, as xai-login does."""
        login = self.sandbox.write_login(self.path.with_name("login"), **members)
        code = (
            "import os, sys; from xaiproxy import config, token_json, token_store, token_writer\n"
            "store = token_store.TokenStore(config.from_environ(os.environ))\n"
            "with token_writer.locked(store, 5) as writer: writer.save(token_json.from_json(open(sys.argv[1]).read()))"
        )
        subprocess.run(
            [sys.executable, "-c", code, self.path.with_name("login")],
            check=True,
            env={**os.environ, **self.sandbox.env, "XAI_PROXY_TOKEN_PATH": str(self.path)},
            cwd=self.path.parent,
        )
        return login

    def put(self, **members) -> dict:
        """A login in the file that is stale, unless `members` say otherwise."""
        now = self.now()
        return self.sandbox.write_login(
            self.path, **{"obtained_at": now - 1000, "expires_at": now + 100, **members}
        )

    def put_fresh(self, **members) -> dict:
        return self.put(obtained_at=self.now(), expires_at=self.now() + 21600, **members)

    def pass_(self, seconds: float) -> None:
        end = self.uptime + seconds
        while self.uptime < end:
            self.refresher.turn()
            with contextlib.suppress(errors.LoginUnusable):
                error = self.login().refresh_error
                if error is not None and error not in [failure for _, failure in self.failures]:
                    self.failures.append((self.uptime - refresher.POLL_INTERVAL, error))

    def login(self) -> tokens.Login:
        return self.store.load()

    def times(self) -> list[float]:
        return [at for at, _ in self.failures]


@pytest.fixture
def day(sandbox, tmp_path):
    sandbox.set(device_interval=0)
    return Day(sandbox, tmp_path)


@pytest.fixture(autouse=True)
def nothing_secret_is_logged(caplog, tmp_path):
    caplog.set_level(logging.DEBUG, "xaiproxy")
    yield
    for path in filter(pathlib.Path.is_file, tmp_path.rglob("tokens.json*")):
        for name in ("access_token", "refresh_token"):
            for secret in re.findall(rf'"{name}": "([^"]+)"', path.read_text("ascii", "replace")):
                assert secret not in caplog.text


def works(day) -> bool:
    return day.sandbox.request("GET", "/v1/models", token=day.login().access_token)[0] == 200


def said(caplog, text: str) -> int:
    """The number of log lines with `text`, except the errors that are repeated each minute."""
    return sum(
        text in record.getMessage() for record in caplog.records if record.levelno < logging.ERROR
    )


def outage_lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def tries(day) -> int:
    """How often the refresh token was sent to the sandbox."""
    return sum(seen.get("grant_type") == "refresh_token" for seen in day.sandbox.requests())


def script(day, *answers, **answer) -> None:
    """Script the answers to refreshes, all of them or the given ones in order."""
    day.sandbox.set(
        answers=[
            {"path": TOKEN_ENDPOINT, "grant_type": "refresh_token", **each}
            for each in answers or [answer]
        ]
    )


# refreshing


def test_a_stale_login_is_refreshed_once(day, caplog):
    old = day.put(theirs={"kept": 1}, account="a@example.org")
    day.pass_(120)
    new = day.login()
    assert (day.sandbox.counters()["refreshes"], tries(day), day.failures) == (1, 1, [])
    assert (
        new.access_token != old["access_token"]
        and new.refresh_token != old["refresh_token"]
        and works(day)
    )
    assert (new.extra, new.account, new.scope) == (
        {"theirs": {"kept": 1}},
        "a@example.org",
        old["scope"],
    )
    assert new.expires_at == pytest.approx(day._begin + 21600, abs=2)
    assert json.loads(day.path.read_text())["replaces"] == fingerprint(old["refresh_token"])
    assert sorted(os.listdir(day.path.parent)) == [
        "tokens.json",
        "tokens.json.lock",
        "tokens.json.status",
    ]
    assert [record.getMessage().split(" until ")[0] for record in caplog.records] == [
        "signed in as a@example.org; the access token lasts",
        "refreshed; the access token lasts",
    ]


def test_a_login_is_renewed_when_a_fifth_of_its_life_is_left_and_not_before(day):
    day.put_fresh()
    day._begin += 17279 - 5  # the clock is set forward, or the machine slept
    day.pass_(5)
    assert tries(day) == 0
    day.pass_(2)
    assert (tries(day), day.sandbox.counters()["refreshes"]) == (1, 1)


def test_a_login_of_the_rust_program_is_kept_alive(day):
    whole = day.put_fresh()
    day.path.write_text(
        json.dumps(
            {
                name: whole[name]
                for name in (
                    "access_token",
                    "refresh_token",
                    "expires_at",
                    "token_endpoint",
                    "issuer",
                )
            }
        )
    )  # its issuer is always auth.x.ai
    day.pass_(1)
    assert tries(day) == 0
    day._begin += 17300  # its lifetime is known from the JWT
    day.pass_(1)
    assert works(day) and day.sandbox.counters()["refreshes"] == 1


def test_an_answer_without_refresh_token_keeps_the_one_there_is(day):
    day.sandbox.set(send_refresh_token=False)
    old = day.put()
    day.pass_(1)
    assert (
        day.login().refresh_token == old["refresh_token"]
        and day.login().access_token != old["access_token"]
    )
    day._begin += 20000
    day.pass_(1)
    assert day.sandbox.counters()["refreshes"] == 2 and works(day)


def test_tokens_of_seconds_are_renewed_in_time(day):
    day.sandbox.set(access_token_lifetime=4)
    day.put()
    for _ in range(40):
        day.pass_(0.5)
        assert day.login().state(day.now(), 120) is not State.INVALID
    assert 8 <= day.sandbox.counters()["refreshes"] <= 14


def test_a_clock_set_back_is_put_right_when_a_token_is_refused(day):
    old = day.put_fresh()
    day._begin -= 864000
    day.pass_(60)
    assert tries(day) == 0
    day.store.ask_refresh(old["access_token"])
    day.pass_(1)
    assert tries(day) == 1 and day.login().expires_at == pytest.approx(day.now() + 21600, abs=5)


def test_a_leftover_of_a_killed_refresher_is_used_instead_of_the_spent_token(day):
    old = day.put()
    answer = day.sandbox.refresh(old["refresh_token"])[1]
    login = token_json.from_response(
        answer,
        now=day.now(),
        issuer=old["issuer"],
        client_id=old["client_id"],
        token_endpoint=old["token_endpoint"],
    )
    day.store.new_path.write_text(token_json.to_json(login, fingerprint(old["refresh_token"])))
    day.start()
    assert day.login() == login
    day.pass_(60)
    assert day.sandbox.counters()["reuses"] == 0 and works(day)


# failing, before anything was spent


@pytest.mark.parametrize(
    "answer",
    [
        {"error": "unavailable", "headers": {"Retry-After": "0"}},
        {"error": "cloudflare_challenge"},
        {"error": "temporarily_unavailable"},
        {"status": 429, "body": {}},
        {"status": 415, "body": "form only"},
        {"status": 404, "body": "nothing here"},
        {"status": 521, "body": "<html>web server is down</html>"},
        {"status": 500, "body": {"error": "server_error"}},
    ],
    ids=lambda answer: str(answer.get("error", answer.get("status"))),
)
def test_a_definite_failure_backs_off_and_the_old_login_stays(day, answer, caplog):
    old = day.put(expires_at=day.now() + 50)
    script(day, **answer)
    day.pass_(100)
    times = day.times()
    assert times[0] == 0 and 10 <= len(times) <= 18
    for nth, (at, error) in enumerate(day.failures):
        assert (error.terminal, error.at, error.failures) == (False, day._begin + at, nth + 1)
        assert error.code == "issuer_unavailable"
        wait = error.retry_at - error.at
        longest = max(0, 50 - at) + 10  # after expiry, 10
        assert min(2**nth / 2, 30, longest) <= wait <= min(2**nth, 60, longest)
        if nth + 1 < len(times):
            assert 0 <= times[nth + 1] - at - wait <= refresher.POLL_INTERVAL
    assert tries(day) == len(times)
    assert (day.login().access_token, day.login().refresh_token) == (
        old["access_token"],
        old["refresh_token"],
    )
    assert said(caplog, "could not be refreshed") == 1
    day.sandbox.set(answers=[])
    day.pass_(60)
    assert works(day) and day.login().refresh_error is None
    assert said(caplog, f"refreshed after {len(times)} failures") == 1


def test_an_issuer_that_was_down_for_long_is_noticed_within_seconds_of_its_return(day, caplog):
    day.put()
    script(day, error="unavailable")
    day.pass_(600)
    assert tries(day) < 600 / 5
    script(day, delay=0)
    day.pass_(10.5)
    assert works(day) and said(caplog, "could not be refreshed") == 1


def test_failures_leave_nothing_open(day):
    day.put()
    script(day, error="unavailable")
    day.pass_(5)
    before = len(os.listdir("/proc/self/fd"))
    day.pass_(100)
    assert tries(day) > 6 and len(os.listdir("/proc/self/fd")) == before
    assert sorted(os.listdir(day.path.parent)) == [
        "tokens.json",
        "tokens.json.lock",
        "tokens.json.status",
    ]


def test_retry_after_is_honoured(day):
    day.put()
    script(day, error="unavailable", headers={"Retry-After": "40"})
    day.pass_(100)
    assert day.times() == pytest.approx([0, 40, 80], abs=0.5)


def test_the_wait_is_over_at_once_on_sighup(day):
    day.put()
    script(day, error="unavailable", headers={"Retry-After": "250"}, times=1)
    day.pass_(10)
    assert tries(day) == 1
    day.refresher.on_signal(signal.SIGHUP)
    day.pass_(1)
    assert tries(day) == 2 and works(day)


@pytest.mark.parametrize(
    "error, code", [("tier_denied", "access_denied"), ("invalid_client", "invalid_client")]
)
def test_a_refusal_of_plan_or_client_is_tried_every_five_minutes(day, error, code, caplog):
    day.put()
    script(day, error=error)
    day.pass_(650)
    assert day.times() == pytest.approx([0, 300, 600], abs=0.5)
    assert {
        (error.code, error.terminal, round(error.retry_at - error.at)) for _, error in day.failures
    } == {(code, False, 300)}
    assert said(caplog, "could not be refreshed") == 1
    script(day, delay=0)
    day.pass_(300)
    assert works(day) and day.login().refresh_error is None


# failing, when the refresh token may be spent


@pytest.mark.parametrize(
    "answer",
    [
        {"cut": "reset"},
        {"cut": "close"},
        {"status": 200, "body": {}},
        {"status": 200, "body": "no JSON"},
        {"status": 200, "body": "<html>welcome</html>"},
        {"error": "unavailable"},
        {"error": "internal"},
        {"error": "bad_gateway"},
        {"status": 524, "body": "<html>a timeout</html>"},
        {"status": 502, "body": {"error": "bad_gateway"}},
    ],
    ids=str,
)
def test_a_lost_answer_is_tried_three_times_and_then_shortly_before_the_token_expires(
    day, answer, caplog
):
    last_try_at = day.now() + 100 - 50
    day.put(obtained_at=day.now() - 400, expires_at=day.now() + 100)
    script(day, **answer)
    day.pass_(45)
    assert tries(day) == 3 and day.times()[2] <= 3.5
    assert [error.code for _, error in day.failures] == ["answer_lost"] * 3
    assert day.failures[2][1].retry_at == pytest.approx(last_try_at, abs=0.1)
    day.start()  # nor does another process
    day._begin += 45
    day.pass_(4)
    assert tries(day) == 3
    day.pass_(10)
    assert tries(day) >= 5  # now there is nothing to lose: backoff
    day.sandbox.set(answers=[])
    day.pass_(60)
    assert works(day) and day.sandbox.counters()["reuses"] == 0


def test_a_lost_answer_is_had_again_within_the_issuers_grace(day):
    day.sandbox.set(grace=60)
    day.put()
    script(day, cut="reset", process=True, times=2)
    day.pass_(10)
    assert (tries(day), day.sandbox.counters()["reuses"]) == (3, 0)
    assert works(day) and day.login().refresh_error is None


def test_a_lost_answer_is_tried_again_when_upstream_refuses_the_token(day):
    old = day.put(obtained_at=day.now() - 20000, expires_at=day.now() + 4000)
    script(day, cut="reset")
    day.pass_(60)
    assert tries(day) == 3
    day.sandbox.set(answers=[])
    day.store.ask_refresh(old["access_token"])
    day.pass_(1)
    assert tries(day) == 4 and works(day)


def test_a_lost_answer_without_grace_ends_the_login_and_says_so(day, caplog):
    day.put()
    script(day, cut="reset", process=True, times=1)
    day.pass_(60)
    assert (tries(day), day.sandbox.counters()["reuses"]) == (2, 1)
    assert day.login().refresh_error.terminal


# refused


def test_a_dead_login_is_said_once_and_its_successor_is_used_without_a_restart(day, caplog):
    old = day.put()
    day.sandbox.kill("logins")
    day.pass_(600)
    day.store.ask_refresh(old["access_token"])
    day.pass_(600)
    [(at, error)] = day.failures
    assert (at, error.code, error.terminal, error.retry_at) == (0, "invalid_grant", True, None)
    assert tries(day) == 1
    assert said(caplog, errors.SIGN_IN) == 1
    day.start()  # another process reads it in the file, and says it again
    day.pass_(600)
    assert tries(day) == 1 and said(caplog, errors.SIGN_IN) == 2
    new = day.sign_in(obtained_at=day.now() - 1000, expires_at=day.now() + 100)
    day.pass_(1)
    assert (
        works(day)
        and day.login().refresh_error is None
        and day.login().access_token != new["access_token"]
    )
    assert (tries(day), day.sandbox.counters()["reuses"]) == (2, 0)


def test_a_login_that_has_ended_is_an_error_each_minute_once_no_request_can_be_served(day, caplog):
    day.put()
    day.sandbox.kill("logins")
    day.pass_(95)
    assert outage_lines(caplog) == []
    day.pass_(130)  # the access token expires after 100
    assert (
        outage_lines(caplog)
        == [f"requests cannot be served: the login has ended (invalid_grant); {judgement.SIGN_IN}"]
        * 3
    )
    day.sign_in()
    day.pass_(100)
    assert len(outage_lines(caplog)) == 3


def test_an_outage_of_the_issuer_is_an_error_each_minute_once_no_request_can_be_served(day, caplog):
    day.put()
    script(day, error="cloudflare_challenge")
    day.pass_(95)
    assert outage_lines(caplog) == []
    day.pass_(130)
    assert (
        len(outage_lines(caplog)) == 3
        and "cannot be renewed (issuer_unavailable)" in outage_lines(caplog)[0]
    )
    day.sandbox.set(answers=[])
    day.pass_(100)
    assert len(outage_lines(caplog)) == 3 and said(caplog, "refreshed after") == 1


def judged(day) -> judgement.Verdict:
    login, now = day.login(), day.now()
    refused = day.store.is_refused(login, now)
    return judgement.judge(
        login, now, 0.0, refused, refresher_status.read(day.store, login, now)
    ).verdict


def test_a_failure_is_no_longer_told_when_another_process_has_signed_in(day):
    script(day, error="unavailable", headers={"Retry-After": "300"})
    day.put()
    day.pass_(3)
    assert judged(day) is judgement.Verdict.FAILING
    day.sign_in()
    day.pass_(30)
    assert judged(day) is judgement.Verdict.GOOD


def test_a_disk_that_was_full_is_no_longer_told_when_another_process_could_save(day):
    day.put()
    day.store.new_path.mkdir()  # nobody can make a file there
    day.pass_(3)
    assert judged(day) is judgement.Verdict.NO_ROOM
    day.store.new_path.rmdir()
    day.sign_in()
    day.pass_(30)
    assert judged(day) is judgement.Verdict.GOOD


def test_a_refresh_that_was_declined_is_no_failure_once_upstream_takes_the_token_again(day):
    old = day.put_fresh()
    day.pass_(1)
    for token in (old["access_token"], None):
        day.store.ask_refresh(token or day.login().access_token)
        day.pass_(2)
    assert (tries(day), day.login().refresh_error.code, judged(day)) == (
        1,
        "upstream_refuses",
        judgement.Verdict.REFUSED,
    )
    day.store.refused_path.unlink()  # as the proxy does
    day.store.refused = None
    assert judged(day) is judgement.Verdict.GOOD


def test_a_file_of_version_0_1_that_waits_after_a_lost_answer_goes_on_waiting(day):
    day.put(
        obtained_at=day.now() - 15000,
        expires_at=day.now() + 3000,
        refresh_error={
            "code": "answer_lost",
            "description": "x gave no whole answer",
            "at": day.now() - 1800,
            "terminal": False,
            "retry_at": None,
        },
    )
    day.pass_(60)
    assert tries(day) == 0
    day._begin += 3000 - 600
    day.pass_(10)
    assert tries(day) == 1 and works(day)


def test_the_remembered_endpoint_is_trusted_again_after_a_refresh(day):
    script(day, {"error": "unavailable", "headers": {"Retry-After": "1"}, "times": 1})
    day.put()
    day.pass_(10)
    day._begin += 20000
    day.pass_(2)
    assert day.sandbox.counters()["refreshes"] == 2
    assert sum("openid-configuration" in seen["target"] for seen in day.sandbox.requests()) == 1


def test_new_tokens_that_are_dropped_are_told(day, caplog):
    script(day, delay=1.0)
    day.put()
    removal = threading.Timer(0.5, day.path.unlink)
    removal.start()
    day.pass_(3)
    removal.join()
    assert day.sandbox.counters()["refreshes"] == 1
    assert said(caplog, "so the new tokens of that login are dropped") == 1


def test_a_lock_that_hangs_is_told_by_the_light_and_an_error(day, caplog):
    day.put(obtained_at=day.now() - 2000, expires_at=day.now() + 150)
    with token_writer.locked(day.store, 0):
        day.pass_(70)
        assert judged(day) is judgement.Verdict.FAILING
        day.pass_(130)
    assert outage_lines(caplog)[0].endswith("and cannot be renewed (locked)")


def test_a_folder_that_cannot_be_written_is_an_error_once_the_token_expired(day, caplog):
    day.put()
    day.store.new_path.mkdir()
    day.pass_(230)
    assert (
        len(outage_lines(caplog)) == 3
        and "no renewed login can be saved" in outage_lines(caplog)[0]
    )


def test_once_says_that_a_next_try_is_waited_for(day):
    day.put(expires_at=day.now() - 5)
    script(day, error="unavailable", headers={"Retry-After": "300"})
    for _ in range(2):
        day.start()
        with pytest.raises(errors.IssuerUnavailable) as caught:
            day.refresher.once()
    assert tries(day) == 1 and "next try in " in str(caught.value)


def test_once_tries_when_the_next_try_is_from_before_the_clock_was_set_back(day):
    day.put(
        expires_at=day.now() - 5,
        refresh_error={
            "code": "issuer_unavailable",
            "description": "",
            "at": day.now() + 3600,
            "retry_at": day.now() + 3660,
            "failures": 9,
        },
    )
    day.start()
    assert day.refresher.once() == 0 and works(day)


def test_each_dead_login_is_said(day, caplog):
    for number in (1, 2):
        day.put()
        day.sandbox.kill("logins")
        day.pass_(10)
        assert said(caplog, errors.SIGN_IN) == tries(day) == number


def test_an_outage_is_said_once_whatever_it_looks_like(day, caplog):
    day.put()
    script(
        day,
        *(
            {"error": error, "times": 1}
            for error in ("bad_gateway", "unavailable", "cloudflare_challenge", "internal")
        ),
    )
    day.pass_(60)
    assert works(day) and len(day.failures) == 4
    assert said(caplog, "could not be refreshed") == 1


def test_a_refused_grant_is_not_the_end_when_the_file_holds_another_by_now(day, tmp_path, caplog):
    day.put()
    day.sandbox.kill("logins")
    other = day.sandbox.write_login(
        tmp_path / "other", obtained_at=day.now() - 1000, expires_at=day.now() + 100
    )
    script(day, {"delay": 0.5, "times": 1})
    thread = threading.Thread(target=day.pass_, args=(1,))
    thread.start()
    day.sandbox.wait(
        lambda seen: seen["token_requests"] == 3
    )  # two logins, and the refresh that is on its way
    os.replace(tmp_path / "other", day.path)  # by somebody who takes no lock
    thread.join()
    assert day.failures == [] and day.login().access_token != other["access_token"] and works(day)
    assert said(caplog, "could not be refreshed") == 0


# the token endpoint


def test_a_page_from_the_remembered_endpoint_leads_to_the_one_that_the_issuer_names(day):
    day.put(token_endpoint=f"{day.sandbox.url}/oauth/token")
    day.sandbox.set(answers=[{"path": "/oauth/token", "error": "cloudflare_challenge"}])
    day.pass_(3)
    assert len(day.failures) == 1
    assert day.login().token_endpoint == f"{day.sandbox.url}{TOKEN_ENDPOINT}" and works(day)


def test_a_discovered_endpoint_is_remembered_even_if_it_fails_too(day):
    day.put(token_endpoint=f"{day.sandbox.url}/oauth/token")
    day.sandbox.set(
        answers=[
            {"path": "/oauth/token", "error": "cloudflare_challenge"},
            {"path": TOKEN_ENDPOINT, "grant_type": "refresh_token", "error": "unavailable"},
        ]
    )
    day.pass_(3)
    assert (
        day.login().token_endpoint == f"{day.sandbox.url}{TOKEN_ENDPOINT}"
        and day.login().refresh_error
    )


def test_a_remembered_endpoint_is_used_when_the_issuer_names_none(day):
    day.put()
    day.sandbox.set(
        answers=[
            {"path": "/.well-known/*", "error": "bad_gateway"},
            {
                "path": TOKEN_ENDPOINT,
                "grant_type": "refresh_token",
                "error": "bad_gateway",
                "times": 2,
            },
        ]
    )
    day.pass_(10)
    assert len(day.failures) == 2 and works(day)


@pytest.mark.parametrize(
    "endpoint", [None, "http://192.0.2.1/token", "https://user@127.0.0.1/token", "nonsense"]
)
def test_an_endpoint_that_fails_the_checks_is_never_spoken_to(day, endpoint):
    day.put(token_endpoint=endpoint)
    day.pass_(1)
    assert day.failures == [] and works(day)
    assert day.login().token_endpoint == f"{day.sandbox.url}{TOKEN_ENDPOINT}"


def test_an_issuer_that_is_another_gets_no_refresh_token(day, caplog):
    day.put(token_endpoint=None)
    day.sandbox.set(
        answers=[
            {"path": "/.well-known/*", "status": 200, "body": {"issuer": "https://evil.example"}}
        ]
    )
    day.pass_(30)
    assert tries(day) == 0 and day.failures[0][1].code == "issuer_unavailable"
    assert said(caplog, "XAI_PROXY_ISSUER") == 1


# asked


def test_many_refused_requests_cost_one_refresh(day):
    old = day.put_fresh()
    for _ in range(50):
        day.store.ask_refresh(old["access_token"])
    day.pass_(1)
    for _ in range(50):
        day.store.ask_refresh(old["access_token"])  # by a proxy that has not read the file yet
    day.pass_(300)
    assert tries(day) == 1 and works(day) and day.failures == []


def test_the_note_is_removed_when_it_has_been_acted_upon(day):
    day.store.ask_refresh(day.put_fresh()["access_token"])
    day.pass_(1)
    assert not day.store.refused_path.exists()


@pytest.mark.parametrize("note", ["", "nonsense", fingerprint("another"), "é" * 100000])
def test_a_note_about_another_token_does_nothing(day, note):
    day.put_fresh()
    day.store.refused_path.write_text(note, "utf-8")
    day.pass_(10)
    assert tries(day) == 0


def test_an_ask_that_comes_too_early_is_declined_once_and_done_when_it_may_be(day, caplog):
    day.store.ask_refresh(day.put_fresh()["access_token"])
    day.pass_(1)
    day.store.ask_refresh(day.login().access_token)
    day.pass_(100)
    [(at, error)] = day.failures  # recorded once
    assert at == 1 and error.code == "upstream_refuses" and not error.terminal
    assert error.retry_at - day._begin == pytest.approx(120, abs=0.5)
    assert tries(day) == 1 and said(caplog, "refuses access tokens") == 1
    day.pass_(30)
    assert tries(day) == 2 and day.login().refresh_error is None and works(day)
    day.store.ask_refresh(day.login().access_token)
    day.pass_(225)
    assert tries(day) == 2
    day.pass_(10)
    assert tries(day) == 3


def test_an_upstream_that_refuses_every_token_costs_six_refreshes_in_two_hours(day):
    def pass_on() -> None:
        """Make a tick last a second, of which the refresher sleeps a quarter."""
        day.uptime += 1 - refresher.POLL_INTERVAL

    day.put_fresh()
    day.during_pause = pass_on
    for _ in range(240):
        day.store.ask_refresh(day.login().access_token)
        day.pass_(30)
    # At 0, and after 2, 4, 8, 16 and 32 minutes: each wait is twice the last, up to an hour.
    assert (
        tries(day) == day.sandbox.counters()["refreshes"] == 6
        and day.sandbox.counters()["reuses"] == 0
    )


@pytest.mark.parametrize("clock_error", [864000, -864000])
def test_a_wrong_clock_costs_nothing_when_the_answer_has_no_expires_in(
    sandbox, tmp_path, clock_error
):
    sandbox.set(send_expires_in=False)
    day = Day(sandbox, tmp_path, clock_error=clock_error)
    day.put()
    day.pass_(100)
    assert tries(day) == 1 and works(day)
    assert day.login().expires_at == pytest.approx(day._begin + 21600, abs=2)


def test_a_token_that_is_stale_at_once_is_no_storm(day, caplog):
    day.put()
    claims = (
        base64.urlsafe_b64encode(json.dumps({"exp": int(day.now()) - 5}).encode())
        .decode()
        .rstrip("=")
    )
    script(day, status=200, body={"access_token": f"e30.{claims}.x"})
    day.pass_(100)
    assert 6 <= tries(day) <= 9
    assert {error.code for _, error in day.failures} == {"stale_at_once"}
    assert said(caplog, "check this machine's clock") == 1
    day.sandbox.set(answers=[])
    day.pass_(100)
    assert day.login().refresh_error is None and day.login().state(day.now(), 120) is State.FRESH


# states

STATES = {
    "missing": (lambda day: None, "does not exist"),
    "corrupt": (lambda day: day.path.write_text("{"), "is not JSON"),
    "a folder": (lambda day: day.path.mkdir(), "is not a file"),
    "another issuer's": (
        lambda day: day.put(issuer="https://login.example"),
        "holds a login of https://login.example",
    ),
    "a link": (
        lambda day: (
            day.put(),
            day.path.rename(day.path.with_name("real")),
            day.path.symlink_to("real"),
        ),
        "is a symbolic link",
    ),
    "without refresh token": (lambda day: day.put(refresh_token=None), "holds no refresh token"),
}


@pytest.mark.parametrize("make, sentence", STATES.values(), ids=STATES)
def test_a_login_that_cannot_be_used_is_said_once_and_waited_on(day, make, sentence, caplog):
    make(day)
    day.pass_(60)
    assert [sentence in record.getMessage() for record in caplog.records] == [True]
    assert tries(day) == 0
    if day.path.is_dir():
        day.path.rmdir()
    else:
        day.path.unlink(missing_ok=True)
    day.put()
    day.pass_(1)
    assert works(day)
    day.path.unlink()
    day.pass_(60)
    assert said(caplog, "does not exist") == 1 + (sentence == "does not exist")


def test_a_mode_that_lets_others_in_is_put_right_with_one_warning(day, caplog):
    day.put_fresh()
    day.path.chmod(0o664)
    day.pass_(60)
    assert stat.S_IMODE(day.path.stat().st_mode) == 0o600
    assert said(caplog, "was open to other users (mode 0664); its mode is now 0600") == 1


# the lock and the sign of life


@pytest.fixture
def holder(day):
    """Another process that holds the lock until its stdin is closed."""
    code = "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, day.store.lock_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    yield process
    process.stdin.close(), process.stdout.close()
    process.wait()


def beats(day) -> list[float]:
    """When the refresher gave a sign of life, from now on."""
    seen = []

    def look():
        if day.store.refresher_age(time.time()) is not None:
            seen.append(day.uptime)
            os.utime(day.store.lock_path, (0, 0))

    os.utime(day.store.lock_path, (0, 0))
    day.during_pause = look
    return seen


def gaps(seen) -> list[float]:
    return [round(later - earlier) for earlier, later in itertools.pairwise(seen)]


@pytest.mark.parametrize(
    "make", [lambda day: None, lambda day: day.put_fresh()], ids=["signed out", "signed in"]
)
def test_a_sign_of_life_is_given_every_ten_seconds(day, make):
    make(day)
    seen = beats(day)
    day.pass_(60)
    assert gaps(seen) == [10] * 5
    token_lock.beat(day.store)
    assert day.store.refresher_alive(time.time())


def test_a_sign_of_life_is_given_before_a_refresh_which_may_take_long(day):
    day.put_fresh()
    day.pass_(1)
    os.utime(day.store.lock_path, (0, 0))
    day.put()
    day.pass_(1)
    assert tries(day) == 1 and day.store.refresher_age(time.time()) is not None


def test_signs_of_life_go_on_while_a_refreshed_login_cannot_be_saved(day):
    day.put()
    script(day, {"delay": 0.5, "times": 1})
    seen, aside = beats(day), day.path.with_name("aside")
    look = day.during_pause

    def mend():
        look()
        if day.uptime >= 50 and aside.exists():
            day.path.rmdir()
            aside.rename(day.path)

    day.during_pause = mend
    thread = threading.Thread(target=day.pass_, args=(60,))
    thread.start()
    day.sandbox.wait(
        lambda seen: seen["token_requests"] == 2
    )  # the login, and the refresh that is on its way
    day.path.rename(aside)
    day.path.mkdir()
    thread.join()
    assert gaps(seen)[:4] == [10] * 4
    assert tries(day) == 1 and works(day)


def test_a_held_lock_is_waited_for_with_signs_of_life_and_said_once(day, holder, caplog):
    day.put()
    seen = beats(day)
    look = day.during_pause

    def let_go():
        look()
        if day.uptime >= 150 and not holder.stdin.closed:
            holder.stdin.close()
            holder.wait()

    day.during_pause = let_go
    day.pass_(160)
    assert gaps(seen)[:14] == [10] * 14
    assert said(caplog, "has been held by another process for 60 s") == 1
    assert tries(day) == 1 and works(day)


@pytest.mark.parametrize(
    "look", [lambda day: day.pass_(60), lambda day: day.refresher.once()], ids=["running", "once"]
)
def test_nothing_is_spent_when_another_process_has_done_it_meanwhile(day, holder, look):
    """Nor is that a failure."""
    day.put()
    new = day.sandbox.write_login(day.path.with_name("new"))

    def let_go():
        if day.uptime >= 5 and not holder.stdin.closed:
            os.replace(day.path.with_name("new"), day.path)
            holder.stdin.close()
            holder.wait()

    day.during_pause = let_go
    look(day)
    assert tries(day) == 0 and day.login().access_token == new["access_token"]


def test_sigterm_ends_the_wait_for_the_lock(day, holder):
    day.put()
    day.during_pause = lambda: day.uptime < 3 or day.refresher.on_signal(signal.SIGTERM)
    assert day.refresher.run() == 0
    assert 3 <= day.uptime < 5 and tries(day) == 0


# --once


def once(day) -> int:
    try:
        return day.refresher.once()
    except errors.Error as error:
        return error.exit_code


def test_once_refreshes_what_is_due_and_leaves_no_sign_of_life(day):
    day.put()
    os.utime(day.store.lock_path, (1000, 1000))
    assert once(day) == 0
    assert works(day) and tries(day) == 1
    day.start()
    assert once(day) == 0
    assert tries(day) == 1 and day.store.lock_path.stat().st_mtime == 1000


@pytest.mark.parametrize(
    "make, status",
    [
        (lambda day: None, 77),
        (lambda day: day.path.write_text("{"), 77),
        (lambda day: day.put(issuer="https://other.example"), 77),
        (lambda day: day.put(refresh_token=None), 0),
        (lambda day: day.put(refresh_token=None, expires_at=5), 77),
        (lambda day: (day.put(), day.sandbox.kill("logins")), 77),
        (
            lambda day: day.put_fresh(
                refresh_error={"code": "x", "description": "y", "at": 1, "terminal": True}
            ),
            77,
        ),
        (lambda day: (day.put(), script(day, error="tier_denied")), 77),
        (lambda day: (day.put(), script(day, error="bad_gateway")), 69),
        (lambda day: (day.put(), script(day, cut="reset")), 69),
        (lambda day: (day.put(), day.store.new_path.mkdir()), 75),
    ],
    ids=[
        "missing",
        "corrupt",
        "foreign",
        "fixed",
        "fixed and expired",
        "refused",
        "refused before",
        "plan",
        "down",
        "lost",
        "disk",
    ],
)
def test_once_tells_how_it_went(day, make, status, caplog):
    make(day)
    assert once(day) == status
    assert not [
        record for record in caplog.records if record.levelname == "WARNING"
    ]  # the command says the error itself


def test_once_gives_a_held_lock_up_after_a_minute(day, holder):
    day.put()
    assert once(day) == 75 and day.uptime == pytest.approx(60, abs=1)


def test_once_can_be_interrupted_while_it_waits_for_the_lock(day, holder):
    day.put_fresh()
    assert once(day) == 0
    day.put()
    day.start()
    day.during_pause = lambda: day.refresher.on_signal(signal.SIGINT)
    assert once(day) == 130

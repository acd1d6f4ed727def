"""The refresher's loop in this process, with clocks that advance only while it waits, so that hours
pass in a moment.

The issuer is the sandbox, over real sockets; the lock and the file are real. The refresher as a
process: test_running.py.
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

    `failures`: what was recorded in the file, as (seconds since the start, error).
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
        """Start a new refresher, which remembers nothing."""
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
        """Write a login in another process, with the lock, as xai-login does."""
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
        """Write a login that is stale, unless `members` set other times."""
        now = self.now()
        return self.sandbox.write_login(
            self.path, **{"obtained_at": now - 1000, "expires_at": now + 100, **members}
        )

    def put_fresh(self, **members) -> dict:
        return self.put(obtained_at=self.now(), expires_at=self.now() + 21600, **members)

    def pass_(self, seconds: float) -> None:
        end, read = self.uptime + seconds, None
        while self.uptime < end:
            self.refresher.turn()
            with contextlib.suppress(errors.LoginUnusable, FileNotFoundError):
                status = self.path.stat()
                if (status.st_ino, status.st_ctime_ns) == read:
                    continue
                read = (status.st_ino, status.st_ctime_ns)
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


def logged(caplog, text: str) -> int:
    """The number of log lines with `text`, except the errors that are repeated each minute."""
    return sum(
        text in record.getMessage() for record in caplog.records if record.levelno < logging.ERROR
    )


def outage_lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def tries(day) -> int:
    """The number of requests to the sandbox with the refresh token."""
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
    # The clock was set forward, or the machine was suspended.
    day._begin += 17279 - 5
    day.pass_(5)
    assert tries(day) == 0
    day.pass_(2)
    assert (tries(day), day.sandbox.counters()["refreshes"]) == (1, 1)


def test_a_login_of_the_rust_program_is_refreshed(day):
    # This program's issuer is always auth.x.ai.
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
    )
    day.pass_(1)
    assert tries(day) == 0
    # The lifetime is known from the JWT.
    day._begin += 17300
    day.pass_(1)
    assert works(day) and day.sandbox.counters()["refreshes"] == 1


def test_a_response_without_refresh_token_keeps_the_former(day):
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


def test_tokens_with_a_lifetime_of_seconds_are_refreshed_in_time(day):
    day.sandbox.set(access_token_lifetime=4)
    day.put()
    for _ in range(40):
        day.pass_(0.5)
        assert day.login().state(day.now(), 120) is not State.INVALID
    assert 8 <= day.sandbox.counters()["refreshes"] <= 14


def test_a_token_refused_after_the_clock_was_set_back_is_refreshed(day):
    old = day.put_fresh()
    day._begin -= 864000
    day.pass_(60)
    assert tries(day) == 0
    day.store.ask_refresh(old["access_token"])
    day.pass_(1)
    assert tries(day) == 1 and day.login().expires_at == pytest.approx(day.now() + 21600, abs=5)


def test_the_leftover_of_a_killed_refresher_replaces_the_spent_token(day):
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


# failures before the refresh token is spent


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
def test_a_definite_failure_backs_off_and_keeps_the_old_login(day, answer, caplog):
    old = day.put(expires_at=day.now() + 50)
    script(day, **answer)
    day.pass_(100)
    times = day.times()
    assert times[0] == 0 and 10 <= len(times) <= 18
    for nth, (at, error) in enumerate(day.failures):
        assert (error.terminal, error.at, error.failures) == (False, day._begin + at, nth + 1)
        assert error.code == "issuer_unavailable"
        wait = error.retry_at - error.at
        # 10 s after expiry at the latest.
        longest = max(0, 50 - at) + 10
        assert min(2**nth / 2, 30, longest) <= wait <= min(2**nth, 60, longest)
        if nth + 1 < len(times):
            assert 0 <= times[nth + 1] - at - wait <= refresher.POLL_INTERVAL
    assert tries(day) == len(times)
    assert (day.login().access_token, day.login().refresh_token) == (
        old["access_token"],
        old["refresh_token"],
    )
    assert logged(caplog, "could not be refreshed") == 1
    day.sandbox.set(answers=[])
    day.pass_(60)
    assert works(day) and day.login().refresh_error is None
    assert logged(caplog, f"refreshed after {len(times)} failures") == 1


def test_a_long_outage_of_the_issuer_ends_within_seconds_of_its_return(day, caplog):
    day.put()
    script(day, error="unavailable")
    day.pass_(600)
    assert tries(day) < 600 / 5
    script(day, delay=0)
    day.pass_(10.5)
    assert works(day) and logged(caplog, "could not be refreshed") == 1


def test_failures_leave_no_descriptor_open(day):
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


def test_retry_after_sets_the_next_try(day):
    day.put()
    script(day, error="unavailable", headers={"Retry-After": "40"})
    day.pass_(100)
    assert day.times() == pytest.approx([0, 40, 80], abs=0.5)


def test_sighup_ends_the_backoff(day):
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
def test_a_refused_plan_or_client_is_retried_every_five_minutes(day, error, code, caplog):
    day.put()
    script(day, error=error)
    day.pass_(650)
    assert day.times() == pytest.approx([0, 300, 600], abs=0.5)
    assert {
        (error.code, error.terminal, round(error.retry_at - error.at)) for _, error in day.failures
    } == {(code, False, 300)}
    assert logged(caplog, "could not be refreshed") == 1
    script(day, delay=0)
    day.pass_(300)
    assert works(day) and day.login().refresh_error is None


# failures after which the refresh token may be spent


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
def test_a_lost_response_gets_three_tries_and_one_shortly_before_expiry(day, answer, caplog):
    last_try_at = day.now() + 100 - 50
    day.put(obtained_at=day.now() - 400, expires_at=day.now() + 100)
    script(day, **answer)
    day.pass_(45)
    assert tries(day) == 3 and day.times()[2] <= 3.5
    assert [error.code for _, error in day.failures] == ["answer_lost"] * 3
    assert day.failures[2][1].retry_at == pytest.approx(last_try_at, abs=0.1)
    # Another process does not retry either.
    day.start()
    day._begin += 45
    day.pass_(4)
    assert tries(day) == 3
    day.pass_(10)
    # The token expired, so there is nothing to lose: backoff.
    assert tries(day) >= 5
    day.sandbox.set(answers=[])
    day.pass_(60)
    assert works(day) and day.sandbox.counters()["reuses"] == 0


def test_a_lost_response_is_recovered_within_the_issuers_grace(day):
    day.sandbox.set(grace=60)
    day.put()
    script(day, cut="reset", process=True, times=2)
    day.pass_(10)
    assert (tries(day), day.sandbox.counters()["reuses"]) == (3, 0)
    assert works(day) and day.login().refresh_error is None


def test_a_lost_response_is_retried_when_upstream_refuses_the_token(day):
    old = day.put(obtained_at=day.now() - 20000, expires_at=day.now() + 4000)
    script(day, cut="reset")
    day.pass_(60)
    assert tries(day) == 3
    day.sandbox.set(answers=[])
    day.store.ask_refresh(old["access_token"])
    day.pass_(1)
    assert tries(day) == 4 and works(day)


def test_a_lost_response_without_grace_ends_the_login(day, caplog):
    day.put()
    script(day, cut="reset", process=True, times=1)
    day.pass_(60)
    assert (tries(day), day.sandbox.counters()["reuses"]) == (2, 1)
    assert day.login().refresh_error.terminal


# refused grants


def test_a_dead_login_is_logged_once_and_a_new_one_is_used_without_restart(day, caplog):
    old = day.put()
    day.sandbox.kill("logins")
    day.pass_(600)
    day.store.ask_refresh(old["access_token"])
    day.pass_(600)
    [(at, error)] = day.failures
    assert (at, error.code, error.terminal, error.retry_at) == (0, "invalid_grant", True, None)
    assert tries(day) == 1
    assert logged(caplog, errors.SIGN_IN) == 1
    # Another process reads it in the file, and logs it again.
    day.start()
    day.pass_(600)
    assert tries(day) == 1 and logged(caplog, errors.SIGN_IN) == 2
    new = day.sign_in(obtained_at=day.now() - 1000, expires_at=day.now() + 100)
    day.pass_(1)
    assert (
        works(day)
        and day.login().refresh_error is None
        and day.login().access_token != new["access_token"]
    )
    assert (tries(day), day.sandbox.counters()["reuses"]) == (2, 0)


def test_a_dead_login_is_an_error_each_minute_once_no_request_is_served(day, caplog):
    day.put()
    day.sandbox.kill("logins")
    day.pass_(95)
    assert outage_lines(caplog) == []
    # The access token expires after 100 s.
    day.pass_(130)
    assert (
        outage_lines(caplog)
        == [f"requests cannot be served: the login has ended (invalid_grant); {judgement.SIGN_IN}"]
        * 3
    )
    day.sign_in()
    day.pass_(100)
    assert len(outage_lines(caplog)) == 3


def test_an_issuer_outage_is_an_error_each_minute_once_no_request_is_served(day, caplog):
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
    assert len(outage_lines(caplog)) == 3 and logged(caplog, "refreshed after") == 1


def judged(day) -> judgement.Verdict:
    login, now = day.login(), day.now()
    refused = day.store.is_refused(login, now)
    return judgement.judge(
        login, now, 0.0, refused, refresher_status.read(day.store, login, now)
    ).verdict


def test_a_sign_in_by_another_process_clears_a_failure(day):
    script(day, error="unavailable", headers={"Retry-After": "300"})
    day.put()
    day.pass_(3)
    assert judged(day) is judgement.Verdict.FAILING
    day.sign_in()
    day.pass_(30)
    assert judged(day) is judgement.Verdict.GOOD


def test_a_save_by_another_process_clears_a_full_disk(day):
    day.put()
    # No process can make a file there.
    day.store.new_path.mkdir()
    day.pass_(3)
    assert judged(day) is judgement.Verdict.NO_ROOM
    day.store.new_path.rmdir()
    day.sign_in()
    day.pass_(30)
    assert judged(day) is judgement.Verdict.GOOD


def test_a_declined_refresh_is_no_failure_once_upstream_accepts_the_token(day):
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
    # As the proxy does.
    day.store.refused_path.unlink()
    day.store.refused = None
    assert judged(day) is judgement.Verdict.GOOD


def test_the_wait_after_a_lost_response_in_a_file_of_version_0_1_holds(day):
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


def test_the_remembered_endpoint_is_used_again_after_a_refresh(day):
    script(day, {"error": "unavailable", "headers": {"Retry-After": "1"}, "times": 1})
    day.put()
    day.pass_(10)
    day._begin += 20000
    day.pass_(2)
    assert day.sandbox.counters()["refreshes"] == 2
    assert sum("openid-configuration" in seen["target"] for seen in day.sandbox.requests()) == 1


def test_new_tokens_that_are_dropped_are_logged(day, caplog):
    script(day, delay=1.0)
    day.put()
    removal = threading.Timer(0.5, day.path.unlink)
    removal.start()
    day.pass_(3)
    removal.join()
    assert day.sandbox.counters()["refreshes"] == 1
    assert logged(caplog, "so the new tokens of that login are dropped") == 1


def test_a_lock_that_hangs_is_in_the_status_and_an_error(day, caplog):
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


def test_once_reports_a_backoff(day):
    day.put(expires_at=day.now() - 5)
    script(day, error="unavailable", headers={"Retry-After": "300"})
    for _ in range(2):
        day.start()
        with pytest.raises(errors.IssuerUnavailable) as caught:
            day.refresher.once()
    assert tries(day) == 1 and "next try in " in str(caught.value)


def test_once_ignores_a_backoff_from_before_the_clock_was_set_back(day):
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


def test_each_dead_login_is_logged(day, caplog):
    for number in (1, 2):
        day.put()
        day.sandbox.kill("logins")
        day.pass_(10)
        assert logged(caplog, errors.SIGN_IN) == tries(day) == number


def test_an_outage_with_changing_errors_is_logged_once(day, caplog):
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
    assert logged(caplog, "could not be refreshed") == 1


def test_a_refused_grant_is_ignored_once_the_file_has_another(day, tmp_path, caplog):
    day.put()
    day.sandbox.kill("logins")
    other = day.sandbox.write_login(
        tmp_path / "other", obtained_at=day.now() - 1000, expires_at=day.now() + 100
    )
    script(day, {"delay": 0.5, "times": 1})
    thread = threading.Thread(target=day.pass_, args=(1,))
    thread.start()
    # Two logins, and the refresh that is in flight.
    day.sandbox.wait(lambda seen: seen["token_requests"] == 3)
    # A writer that does not take the lock.
    os.replace(tmp_path / "other", day.path)
    thread.join()
    assert day.failures == [] and day.login().access_token != other["access_token"] and works(day)
    assert logged(caplog, "could not be refreshed") == 0


# the token endpoint


def test_an_html_page_from_the_remembered_endpoint_starts_discovery(day):
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
def test_an_endpoint_that_fails_the_checks_gets_no_request(day, endpoint):
    day.put(token_endpoint=endpoint)
    day.pass_(1)
    assert day.failures == [] and works(day)
    assert day.login().token_endpoint == f"{day.sandbox.url}{TOKEN_ENDPOINT}"


def test_another_issuer_gets_no_refresh_token(day, caplog):
    day.put(token_endpoint=None)
    day.sandbox.set(
        answers=[
            {"path": "/.well-known/*", "status": 200, "body": {"issuer": "https://evil.example"}}
        ]
    )
    day.pass_(30)
    assert tries(day) == 0 and day.failures[0][1].code == "issuer_unavailable"
    assert logged(caplog, "XAI_PROXY_ISSUER") == 1


# refreshes that the proxy asks for


def test_many_refused_requests_cost_one_refresh(day):
    old = day.put_fresh()
    for _ in range(50):
        day.store.ask_refresh(old["access_token"])
    day.pass_(1)
    for _ in range(50):
        # A proxy that has not read the file yet asks once more.
        day.store.ask_refresh(old["access_token"])
    day.pass_(300)
    assert tries(day) == 1 and works(day) and day.failures == []


def test_the_note_is_removed_after_the_refresh(day):
    day.store.ask_refresh(day.put_fresh()["access_token"])
    day.pass_(1)
    assert not day.store.refused_path.exists()


@pytest.mark.parametrize("note", ["", "nonsense", fingerprint("another"), "é" * 100000])
def test_a_note_about_another_token_does_nothing(day, note):
    day.put_fresh()
    day.store.refused_path.write_text(note, "utf-8")
    day.pass_(10)
    assert tries(day) == 0


def test_an_asked_refresh_that_is_too_early_is_declined_once_and_made_later(day, caplog):
    day.store.ask_refresh(day.put_fresh()["access_token"])
    day.pass_(1)
    day.store.ask_refresh(day.login().access_token)
    day.pass_(100)
    # It was recorded once.
    [(at, error)] = day.failures
    assert at == 1 and error.code == "upstream_refuses" and not error.terminal
    assert error.retry_at - day._begin == pytest.approx(120, abs=0.5)
    assert tries(day) == 1 and logged(caplog, "refuses access tokens") == 1
    day.pass_(30)
    assert tries(day) == 2 and day.login().refresh_error is None and works(day)
    day.store.ask_refresh(day.login().access_token)
    day.pass_(225)
    assert tries(day) == 2
    day.pass_(10)
    assert tries(day) == 3


def test_an_upstream_that_refuses_every_token_costs_six_refreshes_in_two_hours(day):
    def pass_on() -> None:
        """Run one turn as one second, of which the refresher sleeps a quarter."""
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
def test_a_wrong_clock_is_harmless_when_the_response_has_no_expires_in(
    sandbox, tmp_path, clock_error
):
    sandbox.set(send_expires_in=False)
    day = Day(sandbox, tmp_path, clock_error=clock_error)
    day.put()
    day.pass_(100)
    assert tries(day) == 1 and works(day)
    assert day.login().expires_at == pytest.approx(day._begin + 21600, abs=2)


def test_a_token_that_is_stale_at_once_backs_off(day, caplog):
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
    assert logged(caplog, "check this machine's clock") == 1
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
def test_an_unusable_login_is_logged_once_and_read_again(day, make, sentence, caplog):
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
    assert logged(caplog, "does not exist") == 1 + (sentence == "does not exist")


def test_a_file_open_to_other_users_is_made_private_with_one_warning(day, caplog):
    day.put_fresh()
    day.path.chmod(0o664)
    day.pass_(60)
    assert stat.S_IMODE(day.path.stat().st_mode) == 0o600
    assert logged(caplog, "was open to other users (mode 0664); its mode is now 0600") == 1


# the lock and the heartbeat


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
    """The times at which the refresher writes a heartbeat, from now on."""
    seen = []

    def record():
        if day.store.refresher_age(time.time()) is not None:
            seen.append(day.uptime)
            os.utime(day.store.lock_path, (0, 0))

    os.utime(day.store.lock_path, (0, 0))
    day.during_pause = record
    return seen


def gaps(seen) -> list[float]:
    return [round(later - earlier) for earlier, later in itertools.pairwise(seen)]


@pytest.mark.parametrize(
    "make", [lambda day: None, lambda day: day.put_fresh()], ids=["signed out", "signed in"]
)
def test_a_heartbeat_is_written_every_ten_seconds(day, make):
    make(day)
    seen = beats(day)
    day.pass_(60)
    assert gaps(seen) == [10] * 5
    token_lock.beat(day.store)
    assert day.store.refresher_alive(time.time())


def test_a_heartbeat_is_written_before_a_refresh(day):
    day.put_fresh()
    day.pass_(1)
    os.utime(day.store.lock_path, (0, 0))
    day.put()
    day.pass_(1)
    assert tries(day) == 1 and day.store.refresher_age(time.time()) is not None


def test_heartbeats_continue_while_a_refreshed_login_cannot_be_saved(day):
    day.put()
    script(day, {"delay": 0.5, "times": 1})
    seen, aside = beats(day), day.path.with_name("aside")
    record = day.during_pause

    def repair():
        record()
        if day.uptime >= 50 and aside.exists():
            day.path.rmdir()
            aside.rename(day.path)

    day.during_pause = repair
    thread = threading.Thread(target=day.pass_, args=(60,))
    thread.start()
    # The sign-in, and the refresh that is in flight.
    day.sandbox.wait(lambda seen: seen["token_requests"] == 2)
    day.path.rename(aside)
    day.path.mkdir()
    thread.join()
    assert gaps(seen)[:4] == [10] * 4
    assert tries(day) == 1 and works(day)


def test_heartbeats_continue_while_a_held_lock_is_logged_once(day, holder, caplog):
    day.put()
    seen = beats(day)
    record = day.during_pause

    def let_go():
        record()
        if day.uptime >= 150 and not holder.stdin.closed:
            holder.stdin.close()
            holder.wait()

    day.during_pause = let_go
    day.pass_(160)
    assert gaps(seen)[:14] == [10] * 14
    assert logged(caplog, "has been held by another process for 60 s") == 1
    assert tries(day) == 1 and works(day)


@pytest.mark.parametrize(
    "run", [lambda day: day.pass_(60), lambda day: day.refresher.once()], ids=["running", "once"]
)
def test_no_token_is_sent_when_another_process_has_refreshed_meanwhile(day, holder, run):
    """This is no failure either."""
    day.put()
    new = day.sandbox.write_login(day.path.with_name("new"))

    def let_go():
        if day.uptime >= 5 and not holder.stdin.closed:
            os.replace(day.path.with_name("new"), day.path)
            holder.stdin.close()
            holder.wait()

    day.during_pause = let_go
    run(day)
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


def test_once_refreshes_a_stale_login_and_writes_no_heartbeat(day):
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
def test_once_returns_the_exit_code_of_the_result(day, make, status, caplog):
    make(day)
    assert once(day) == status
    # The command prints the error itself.
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_once_waits_a_minute_for_the_lock(day, holder):
    day.put()
    assert once(day) == 75 and day.uptime == pytest.approx(60, abs=1)


def test_once_can_be_interrupted_while_it_waits_for_the_lock(day, holder):
    day.put_fresh()
    assert once(day) == 0
    day.put()
    day.start()
    day.during_pause = lambda: day.refresher.on_signal(signal.SIGINT)
    assert once(day) == 130


# The number of refreshes by result, for /metrics


def refreshes(day) -> dict[str, int]:
    return {
        result: number for result, number in refresher_status.refreshes(day.store).items() if number
    }


@pytest.mark.parametrize(
    "fault, result",
    [
        (lambda day: day.sandbox.kill("logins"), "ended"),
        (lambda day: script(day, error="tier_denied"), "entitlement"),
        (lambda day: script(day, error="invalid_client"), "refused_for_now"),
        (lambda day: script(day, status=400, body={"error": "unknown_to_us"}), "refused_for_now"),
        (lambda day: script(day, error="unavailable"), "unreachable"),
        (lambda day: script(day, cut="reset"), "unreachable"),
        (lambda day: day.store.new_path.mkdir(), "disk"),
    ],
    ids=["ended", "plan", "client", "unknown", "503", "lost", "disk"],
)
def test_a_failed_refresh_is_counted_by_its_result(day, fault, result):
    day.put()
    fault(day)
    day.refresher.turn()
    assert refreshes(day) == {result: 1}


def test_refreshes_are_counted_across_logins_and_restarts(day):
    day.put()
    script(day, error="unavailable", headers={"Retry-After": "5"}, times=2)
    day.pass_(30)
    assert works(day) and refreshes(day) == {"unreachable": 2, "ok": 1}
    day.start()
    assert refreshes(day) == {"unreachable": 2, "ok": 1}
    day.put()
    day.pass_(30)
    assert refreshes(day) == {"unreachable": 2, "ok": 2}


def test_two_refreshers_and_once_count_together(day):
    first = day.refresher
    day.start()
    second = day.refresher
    for number, refresher_of_turn in enumerate((first, second, first), 1):
        day.put()
        refresher_of_turn.turn()
        assert refreshes(day) == {"ok": number}
    day.start()
    day.put()
    assert once(day) == 0 and refreshes(day) == {"ok": 4}
    # The status of the refresher that runs stays.
    assert judged(day) is judgement.Verdict.GOOD
    first.turn()
    day.pass_(11)
    assert refreshes(day) == {"ok": 4}


def test_once_alone_counts_and_is_no_running_refresher(day):
    day.refresher = refresher.Refresher(day.settings)
    day.store.status_path.unlink()
    day.put()
    assert once(day) == 0 and refreshes(day) == {"ok": 1}
    assert refresher_status.read(day.store, day.login(), time.time()) is None


def test_refreshes_are_counted_while_the_status_cannot_be_written(day):
    day.put()
    day.store.status_path.unlink()
    day.store.status_path.mkdir()
    day.pass_(5)
    assert works(day) and refreshes(day) == {}
    day.store.status_path.rmdir()
    day.pass_(30)
    assert refreshes(day) == {"ok": 1}

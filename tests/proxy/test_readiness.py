"""/readyz, --status, --doctor and the log agree with the outcome of requests."""

import io
import json
import os
import time

import gevent
import pytest
from proxy_process import ProxyProcess
from scripted_upstream import OK, ScriptedUpstream

from xaiproxy import client_keys, config, errors, refresher_status, tokens
from xaiproxy.login import command as login
from xaiproxy.login import doctor_files, finding, output
from xaiproxy.proxy.outage import Outage
from xaiproxy.refresher_status import Status
from xaiproxy.token_store import TokenStore

REFUSED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"
TRY_AGAIN, SIGN_IN = errors.EXIT_TRY_AGAIN, errors.EXIT_SIGN_IN


class Scene:
    """A proxy, its upstream, and every report about its login."""

    def __init__(self, proxy: ProxyProcess, upstream: ScriptedUpstream):
        self.proxy, self.upstream = proxy, upstream
        self.store = TokenStore(
            config.from_environ(
                {
                    "XAI_PROXY_TOKEN_PATH": str(proxy.token_path),
                    "XAI_PROXY_ISSUER": "http://127.0.0.1:1",
                    "XAI_PROXY_UPSTREAM": upstream.origin,
                },
                dotenv_path=os.devnull,
            )
        )

    def request(self, answer: bytes | None = None) -> int:
        """Return the status of a request.

        `answer`: the API's response, or None if the request must not reach it.
        """
        with self.proxy.client() as client:
            client.request()
            if answer:
                self.upstream.receive().answer(answer)
            return client.message().status

    def ready(self) -> tuple[int, str]:
        answer = self.proxy.ask("GET", "/readyz")
        return answer.status, json.loads(answer.body)["reason"]

    def status(self) -> tuple[int, dict]:
        printed = io.StringIO()
        code = login.status(self.store, output.Output(True, printed, printed))
        return code, json.loads(printed.getvalue())

    def status_text(self) -> str:
        printed = io.StringIO()
        login.status(self.store, output.Output(False, printed, printed))
        return printed.getvalue()

    def doctor(self) -> finding.Finding:
        return doctor_files.lifetime(self.store.load(), self.store, time.time())

    def logged(self, text: str) -> list[str]:
        """Return the levels of all lines that begin with `text`, once there is one."""
        self.proxy.wait_for_log(lambda line: line["message"].startswith(text))
        return [
            line["level"] for line in self.proxy.log_lines() if line["message"].startswith(text)
        ]


@pytest.fixture
def scene(tmp_path):
    with ScriptedUpstream() as upstream, ProxyProcess(tmp_path, upstream=upstream.origin) as proxy:
        proxy.refresher_lives()
        yield Scene(proxy, upstream)


def error(**members) -> dict:
    return {
        "code": "invalid_grant",
        "description": "revoked",
        "at": time.time(),
        "terminal": True,
        "retry_at": None,
        **members,
    }


def test_a_refused_token_of_an_ended_login_is_not_ready(scene):
    scene.proxy.sign_in(refresh_error=error())
    # The token is valid until it expires.
    assert scene.ready()[0] == 200 and scene.request(OK) == 200
    assert scene.status()[0] == SIGN_IN and scene.doctor().exit_code == SIGN_IN
    assert scene.request(REFUSED) == 401
    status, reason = scene.ready()
    ended = "the API refuses the access token, and the login has ended (invalid_grant); run `"
    assert status == 503 and reason.startswith(ended)
    code, event = scene.status()
    assert (code, event["usable"], event["verdict"]) == (SIGN_IN, False, "ended")
    text = scene.status_text()
    assert (
        text.startswith("Not serving: the API refuses the access token, and the login has ended")
        and "is valid" not in text
    )
    assert scene.doctor().exit_code == SIGN_IN and "is valid" not in scene.doctor().message
    assert scene.request(REFUSED) == 401
    assert scene.logged("requests cannot be served: the login has ended") == ["error"]

    # The API accepts that token after all.
    assert scene.request(OK) == 200
    assert scene.logged("requests can be served again") == ["info"]
    old = time.time() - 20
    # A newer report would stay, since the refresher may not have read it.
    os.utime(scene.store.refused_path, (old, old))
    assert (
        scene.request(OK) == 200
        and scene.ready()[0] == 200
        and not scene.store.refused_path.exists()
    )


def test_a_refused_token_is_not_ready_until_it_is_refreshed(scene):
    scene.proxy.sign_in(
        refresh_error=error(code="issuer_unavailable", terminal=False, at=time.time() + 5)
    )
    assert scene.request(REFUSED) == 401
    assert scene.ready() == (
        503,
        "the API refuses the access token, which cannot be renewed (issuer_unavailable)",
    )
    code, event = scene.status()
    assert (code, event["usable"], event["verdict"]) == (TRY_AGAIN, False, "refused")
    assert scene.doctor().exit_code == TRY_AGAIN
    scene.proxy.sign_in("new")
    assert (
        scene.ready() == (200, "signed in")
        and scene.status()[0] == 0
        and scene.doctor().result == "ok"
    )
    assert scene.request(OK) == 200


def test_a_refused_token_without_a_refresh_token_is_not_ready(scene):
    scene.proxy.sign_in(refresh_token=None)
    assert scene.ready()[0] == 200
    assert scene.request(REFUSED) == 401
    status, reason = scene.ready()
    assert (
        status == 503
        and "the API refuses the access token, and the token file holds no refresh token" in reason
    )
    assert scene.request(OK) == 200 and scene.ready()[0] == 200


def test_a_report_of_an_earlier_proxy_counts_until_a_request_succeeds(tmp_path):
    with ScriptedUpstream() as upstream:
        with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy:
            scene = Scene(proxy, upstream)
            proxy.sign_in(refresh_error=error())
            assert scene.request(REFUSED) == 401
        old = time.time() - 20
        os.utime(scene.store.refused_path, (old, old))
        with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy:
            scene = Scene(proxy, upstream)
            assert scene.ready()[0] == 503
            assert (
                scene.request(OK) == 200
                and scene.ready()[0] == 200
                and not scene.store.refused_path.exists()
            )


def test_an_expired_token_whose_refresh_fails_is_not_ready(scene):
    scene.proxy.sign_in(
        expires_in=-5,
        refresh_error=error(code="issuer_unavailable", terminal=False, retry_at=time.time() + 9),
    )
    assert scene.request() == 503 and scene.ready()[0] == 503
    code, event = scene.status()
    assert (code, event["usable"], event["verdict"]) == (TRY_AGAIN, False, "expired")
    assert scene.doctor().exit_code == TRY_AGAIN
    assert scene.logged("requests cannot be served") == ["error"]
    # The end of the outage is logged even without another request.
    scene.proxy.sign_in("new")
    assert scene.logged("requests can be served again") == ["info"]


def test_a_missing_or_malformed_login_is_not_ready(scene):
    for content in (None, "{"):
        if content:
            scene.proxy.token_path.write_text(content)
        assert scene.request() == 401 and scene.ready()[0] == 503 and scene.status()[0] == SIGN_IN
    assert scene.logged("requests cannot be served") == ["error"]


def test_a_key_file_without_keys_is_not_ready(scene):
    scene.proxy.sign_in()
    keys = scene.proxy.token_path.with_name("client-keys")
    assert scene.ready() == (200, "signed in")
    keys.write_text(f"a {client_keys.digest('a-key')}\n")
    assert scene.ready() == (200, "signed in")
    keys.write_text("")
    assert scene.request() == 401
    assert scene.ready() == (
        503,
        "there is no client key that can be used, so every request is refused; see the log",
    )
    keys.write_text(f"a {client_keys.digest('a-key')}\n")
    assert scene.ready() == (200, "signed in")


def test_a_young_token_that_is_refused_twice_is_not_ready(scene):
    scene.proxy.sign_in(age=30)
    with scene.proxy.client() as client:
        client.request()
        for _ in range(2):
            scene.upstream.receive().answer(REFUSED)
        assert client.message().status == 401
    assert scene.ready()[0] == 503


def test_an_old_declined_refresh_does_not_refuse_a_request(scene):
    old = error(
        code="upstream_refuses",
        terminal=False,
        at=time.time() - 15000,
        retry_at=time.time() - 14900,
    )
    scene.proxy.sign_in(expires_in=-1, age=20000, refresh_error=old)
    with scene.proxy.client() as client:
        client.request()
        time.sleep(0.3)
        scene.proxy.sign_in()
        scene.upstream.receive().answer(OK)
        assert client.message().status == 200


def test_a_full_disk_is_reported_although_tokens_json_cannot_be_written(scene):
    scene.proxy.sign_in()
    now = time.time()
    no_room = "No space left on device"
    refresher_status.write(
        scene.store,
        Status(
            now,
            "storage",
            f"{scene.store.path}: {no_room}",
            now + 5,
            no_room,
            tokens.fingerprint(scene.store.load().access_token),
        ),
    )
    status, reason = scene.ready()
    assert status == 200 and reason.endswith(f"but no renewed login can be saved ({no_room})")
    code, event = scene.status()
    assert (code, event["usable"], event["verdict"]) == (0, True, "no_room")
    assert "The refresher reports: No space left on device." in scene.status_text()
    assert scene.doctor().result == "warning" and "No space left" in scene.doctor().message
    scene.proxy.sign_in(expires_in=-5)
    assert (
        scene.ready()[0] == 503
        and scene.status()[0] == TRY_AGAIN
        and scene.doctor().exit_code == TRY_AGAIN
    )


def test_the_refresher_gets_a_second_for_its_heartbeat_after_a_suspend(scene):
    scene.proxy.refresher_lives(False)
    for expires_in, answer in ((-5, None), (3600, REFUSED)):
        scene.proxy.sign_in(f"old{expires_in}", expires_in=expires_in)
        with scene.proxy.client() as client:
            client.request()
            if answer:
                scene.upstream.receive().answer(answer)
            # By now, the proxy has checked the heartbeat.
            time.sleep(0.3)
            scene.proxy.refresher_lives()
            scene.proxy.sign_in("new")
            request = scene.upstream.receive()
            assert request.token == "new"
            request.answer()
            assert client.message().status == 200
        scene.proxy.refresher_lives(False)
    scene.proxy.sign_in("old", expires_in=-5)
    began = time.monotonic()
    assert scene.request() == 503 and 0.9 < time.monotonic() - began < 5


# the log's lines


def test_an_outage_logs_an_error_each_minute_and_its_end(caplog):
    caplog.set_level("INFO")
    now, over = [0.0], [False]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        over[0] = now[0] >= 150
        gevent.sleep(0)

    outage = Outage(lambda: over[0], lambda: now[0], sleep)
    outage.hit("why")
    outage.hit("another why")
    with gevent.Timeout(5):
        while outage.lasts:
            gevent.sleep(0)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "requests cannot be served: why"),
        ("ERROR", "requests cannot be served for 60 s now: another why"),
        ("ERROR", "requests cannot be served for 120 s now: another why"),
        ("INFO", "requests can be served again, after 150 s"),
    ]
    outage.hit("a request that failed while it was over")
    outage.end()
    assert len(caplog.records) == 4 and not outage.lasts


def test_a_request_after_expiry_names_what_prevents_the_renewal(scene):
    scene.proxy.sign_in(expires_in=-5)
    no_room = f"{scene.store.path} cannot be written: No space left on device"
    mark = tokens.fingerprint(scene.store.load().access_token)
    refresher_status.write(
        scene.store, Status(time.time(), "storage", no_room, time.time() + 5, no_room, mark)
    )
    answer = scene.proxy.ask("GET", "/v1/models")
    assert answer.status == 503
    message = json.loads(answer.body)["error"]["message"]
    assert "no renewed login can be saved (No space left on device)" in message
    assert str(scene.store.path) not in message

"""XAI_PROXY_PUBLISH=kubernetes-secret:NAMESPACE/NAME, and the claim, against a real API server."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kube import MERGE, NAME, NAMESPACE, PUBLISH, SECRET, SECRETS, Kube, in_pod, needs_kube
from refresher_process import Process, make_store, mounts, wait_until
from token_files import save

from xaiproxy import config, refresher_status, tokens
from xaiproxy.refresher.kubernetes_api import Api
from xaiproxy.refresher.process import Refresher
from xaiproxy.refresher.published_secret import SPENDS, PublishedSecret
from xaiproxy.refresher.publisher import CHECK_INTERVAL
from xaiproxy.setting_types import SecretName
from xaiproxy.token_store import TokenStore
from xaiproxy.tokens import fingerprint

pytestmark = needs_kube

TOKEN_ENDPOINT = "/oauth2/token"
NOT_PUBLISHED = "the login is not published: "


@pytest.fixture(scope="module")
def running_kube(tmp_path_factory) -> Iterator[Kube]:
    flags = "--max-requests-inflight=1", "--enable-priority-and-fairness=false"
    kube = Kube(tmp_path_factory.mktemp("kube"), *flags)
    yield kube
    kube.down()


@pytest.fixture
def kube(running_kube: Kube) -> Kube:
    """The API server, with the Secret empty and the Role that names it."""
    running_kube.allow()
    running_kube.make_secret()
    (running_kube.account / "token").write_text(running_kube.token)
    return running_kube


class Instance:
    """A refresher with its own copy of the volume, on a clock of its own that begins now."""

    def __init__(self, sandbox, kube: Kube, folder: Path, name: str = "pod-a"):
        environ = {
            **sandbox.env,
            **kube.environ,
            "XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json"),
            "XAI_PROXY_PUBLISH": PUBLISH,
            "POD_UID": name,
        }
        self.sandbox, self.kube = sandbox, kube
        self.settings = config.from_environ(environ, dotenv_path=os.devnull)
        self.store = TokenStore(self.settings)
        folder.mkdir(exist_ok=True)
        self._begin, self.uptime = time.time(), 0.0
        self.start()

    def start(self, api: Api | None = None) -> None:
        name = SecretName(NAMESPACE, NAME)
        api = api or Api(self.settings, name, self.kube.account)
        self.refresher = Refresher(
            self.settings,
            clock=self.now,
            uptime=lambda: self.uptime,
            sleep=self._sleep,
            target=PublishedSecret(api, name, self.settings.instance),
        )
        self.refresher.begin()

    def now(self) -> float:
        return self._begin + self.uptime

    def _sleep(self, seconds: float) -> None:
        self.uptime += seconds

    def pass_(self, seconds: float = 0.25) -> None:
        end = self.uptime + seconds
        while self.uptime < end:
            self.refresher.turn()

    def put_fresh(self, **members) -> dict:
        now = self.now()
        members = {"obtained_at": now, "expires_at": now + 21600, **members}
        return self.sandbox.write_login(self.store.path, **members)

    def put_stale(self) -> dict:
        return self.put_fresh(obtained_at=self.now() - 1000, expires_at=self.now() + 100)

    def status(self) -> refresher_status.Status:
        return refresher_status.filed(self.store)

    def token(self) -> str:
        return self.store.load().access_token


@pytest.fixture
def make(sandbox, kube: Kube, tmp_path: Path, caplog) -> Callable[..., Instance]:
    caplog.set_level(logging.INFO, "xaiproxy")
    sandbox.set(device_interval=0)

    def make(name: str = "pod-a") -> Instance:
        return Instance(sandbox, kube, tmp_path / name, name)

    return make


@pytest.fixture
def one(make: Callable[..., Instance]) -> Instance:
    return make()


def logged(caplog, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


def sent(sandbox) -> int:
    """Count the requests that presented a refresh token."""
    return sum(
        request.get("grant_type") == "refresh_token" for request in sandbox.requests(TOKEN_ENDPOINT)
    )


def annotate(kube: Kube, **annotations: str) -> None:
    body = {"metadata": {"annotations": annotations}}
    assert kube.call("PATCH", SECRET, body, kind=MERGE)[0] == 200


# what the API server answers


def test_the_api_server_answers_as_the_publisher_expects(kube: Kube):
    """The table of answers: what a service account gets whose Role names one Secret."""
    token = kube.token
    version = kube.secret()["metadata"]["resourceVersion"]

    def patch(version: str, **data: str) -> int:
        body = {"metadata": {"resourceVersion": version}, "data": data}
        return kube.call("PATCH", SECRET, body, token, MERGE)[0]

    assert kube.call("GET", SECRET, None, token)[0] == 200
    assert kube.call("GET", f"{SECRETS}/other", None, token)[0] == 403
    assert kube.call("GET", SECRETS, None, token)[0] == 403
    assert kube.call("POST", SECRETS, {"metadata": {"name": NAME}}, token)[0] == 403
    assert kube.call("PUT", SECRET, {"metadata": {"name": NAME}}, token)[0] == 403
    assert kube.call("GET", SECRET, None, None)[0] == 403
    assert kube.call("GET", SECRET, None, "nonsense")[0] == 401
    assert patch(version, a="YQ==") == 200
    assert patch(version, b="Yg==") == 409
    assert patch(kube.secret()["metadata"]["resourceVersion"], b="Yg==") == 200
    assert kube.data() == {"a": "a", "b": "b"}
    version = kube.secret()["metadata"]["resourceVersion"]
    kube.call("DELETE", SECRET)
    assert kube.call("GET", SECRET, None, token)[0] == 404
    assert patch(version, c="Yw==") == 404
    kube.make_secret()
    assert patch(version, c="Yw==") == 409


# publishing


def test_a_refreshed_login_is_published_without_its_refresh_token(one: Instance, caplog):
    one.kube.make_secret(another="kept")
    old = one.put_stale()
    one.pass_()
    data = one.kube.data()
    published = json.loads(data["tokens.json"])
    assert published["access_token"] == one.token() != old["access_token"]
    assert not {"refresh_token", "refresh_try", "asked", "replaces"} & set(published)
    assert data["another"] == "kept"
    assert one.kube.claim() == f"{fingerprint(old['refresh_token'])}/pod-a"
    assert sent(one.sandbox) == 1
    assert one.status().published_at == one.now() - 0.25
    assert logged(caplog, f"published in the Secret {NAMESPACE}/{NAME}") == 1
    # Nothing is written while nothing has changed.
    version = one.kube.secret()["metadata"]["resourceVersion"]
    one.pass_(3 * CHECK_INTERVAL)
    assert one.kube.secret()["metadata"]["resourceVersion"] == version


@pytest.mark.parametrize(
    "change",
    [
        lambda kube: kube.put(),
        lambda kube: kube.put(tokens__json="nonsense"),
        lambda kube: kube.put(tokens__json='{"access_token": "older", "expires_at": 1}'),
        lambda kube: kube.make_secret(),
    ],
    ids=["wiped by kubectl replace", "no login", "an older login", "deleted and made anew"],
)
def test_what_another_writer_has_done_is_repaired_within_a_minute(one: Instance, change, caplog):
    one.put_fresh()
    one.pass_()
    change(one.kube)
    one.pass_(CHECK_INTERVAL)
    assert one.kube.published()["access_token"] == one.token()
    assert logged(caplog, "was changed by another writer; published again") == 1
    assert one.status().publish_failures == 0


def test_a_newer_login_of_another_writer_stays(one: Instance):
    login = one.put_fresh(obtained_at=one.now() - 100)
    one.pass_()
    newer = json.dumps({**one.kube.published(), "obtained_at": login["obtained_at"] + 1})
    one.kube.put(tokens__json=newer)
    one.pass_(2 * CHECK_INTERVAL)
    assert one.kube.data()["tokens.json"] == newer
    assert "holds a newer login than the token file" in one.status().publish_failure


def test_a_missing_secret_is_named_and_used_once_it_is_there(one: Instance, caplog):
    one.kube.call("DELETE", SECRET)
    one.put_fresh()
    one.pass_(120)
    assert logged(caplog, f"{NOT_PUBLISHED}the Secret {NAMESPACE}/{NAME} does not exist; ") == 1
    assert one.status().publish_failures > 5
    one.kube.make_secret()
    one.pass_(CHECK_INTERVAL)
    assert one.kube.published()["access_token"] == one.token()
    assert not one.status().publish_failure


def test_a_role_that_is_taken_away_and_given_back(one: Instance):
    one.put_fresh(obtained_at=one.now() - 2000)
    one.pass_()
    one.kube.forbid()
    old = one.token()
    one.put_stale()
    # Neither published nor renewed: the refresh token could not be claimed.
    wait_until(lambda: one.pass_(30) or "403" in one.status().publish_failure)
    assert "let the service account get that Secret" in one.status().publish_failure
    one.pass_(10)
    assert one.store.load().refresh_error.code == "not_claimed" and sent(one.sandbox) == 0
    one.kube.allow()
    wait_until(lambda: one.pass_(60) or not one.status().publish_failure)
    assert one.kube.published()["access_token"] == one.token() != old
    assert sent(one.sandbox) == 1 and one.store.load().refresh_error is None


def test_a_token_that_is_not_accepted_is_read_again(one: Instance):
    token = one.kube.account / "token"
    for content, reason in (
        ("nonsense", "(HTTP 401, Unauthorized); the token in "),
        ("é", "holds"),
    ):
        token.write_text(content)
        one.put_fresh()
        one.pass_(60)
        assert reason in one.status().publish_failure
    token.write_text(one.kube.token)
    one.pass_(60)
    assert one.kube.published()["access_token"] == one.token()


class Interrupted(Api):
    """Each change by another writer comes between a read of the Secret and the patch."""

    changes: tuple[Callable[[], object], ...] = ()

    def get(self, deadline: float) -> dict:
        secret = super().get(deadline)
        if self.changes:
            change, *self.changes = self.changes
            change()
        return secret


@pytest.mark.parametrize(
    "names, conflicts",
    [
        (("annotate",), 0),
        (("delete and make",), 0),
        (("annotate", "delete and make"), 0),
        (("annotate", "annotate", "annotate"), 1),
        (("delete",), 1),
        (("publish a newer one",), 1),
    ],
    ids=str,
)
def test_a_change_in_the_middle_of_a_change(one: Instance, names, conflicts):
    one.put_fresh()
    newer = one.store.load().obtained_at + 1
    login = json.dumps({"access_token": "newer", "expires_at": 1e10, "obtained_at": newer})
    numbers = itertools.count()
    changes = {
        "annotate": lambda: annotate(one.kube, another=str(next(numbers))),
        "delete and make": one.kube.make_secret,
        "delete": lambda: one.kube.call("DELETE", SECRET),
        "publish a newer one": lambda: one.kube.put(tokens__json=login),
    }
    name = SecretName(NAMESPACE, NAME)
    api = Interrupted(one.settings, name, one.kube.account)
    api.changes = tuple(changes[name] for name in names)
    one.start(api)
    one.pass_()
    assert one.status().publish_failures == conflicts
    if names == ("publish a newer one",):
        one.pass_(60)
        assert one.kube.published()["access_token"] == "newer"
        return
    if names == ("delete",):
        assert "does not exist" in one.status().publish_failure
        one.kube.make_secret()
    one.pass_(5)
    assert one.kube.published()["access_token"] == one.token()
    assert not one.status().publish_failure


def test_an_overloaded_api_server_is_asked_again_after_its_retry_after(one: Instance):
    """It serves one request at a time, and rejects the others of service accounts."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ending = threading.Event()

        def crowd() -> None:
            while not ending.is_set():
                one.kube.call("GET", SECRET, None, one.kube.token)

        callers = [pool.submit(crowd) for _ in range(8)]

        def is_rejected() -> bool:
            one.put_fresh()
            one.pass_()
            return "(HTTP 429); too many requests at once" in one.status().publish_failure

        try:
            wait_until(is_rejected)
        finally:
            ending.set()
        for caller in callers:
            caller.result()
    failures = one.status().publish_failures
    # Retry-After: 1.
    one.pass_(0.75)
    assert one.status().publish_failures == failures
    one.pass_(60)
    assert one.kube.published()["access_token"] == one.token()


def test_an_api_server_that_cannot_be_reached(one: Instance):
    environ = {**one.kube.environ, "KUBERNETES_SERVICE_PORT": "1"}
    settings = config.from_environ(environ, dotenv_path=os.devnull)
    one.start(Api(settings, SecretName(NAMESPACE, NAME), one.kube.account))
    one.put_stale()
    one.pass_(30)
    error = one.store.load().refresh_error
    assert error.code == "not_claimed" and sent(one.sandbox) == 0
    assert "127.0.0.1:1 cannot be reached (Connection refused); check " in error.description
    assert one.status().publish_failure in error.description
    one.start()
    one.pass_(60)
    assert one.kube.published()["access_token"] == one.token()


# spent once


def test_a_second_copy_of_the_login_spends_nothing_once_the_first_has_renewed(make, caplog):
    first, second = make("pod-a"), make("pod-b")
    first.put_stale()
    save(second.store, first.store.load())
    first.pass_()
    second.pass_(90)
    assert sent(first.sandbox) == 1
    assert logged(caplog, "holds a newer login than the token file, whose refresh token is") == 1
    error = second.store.load().refresh_error
    assert (error.code, error.terminal) == ("not_claimed", False)
    assert second.kube.published()["access_token"] == first.token()
    # Also when the access token has expired.
    second.pass_(30)
    assert sent(first.sandbox) == 1
    # A person signs in.
    second.put_fresh()
    second.pass_(60)
    assert second.kube.published()["access_token"] == second.token()


def test_two_copies_of_a_login_present_each_refresh_token_once(make):
    instances = [make("pod-a"), make("pod-b")]
    instances[0].put_stale()
    save(instances[1].store, instances[0].store.load())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda instance: instance.pass_(40), instances))
    assert sent(instances[0].sandbox) == 1


def test_a_claim_of_a_refresher_that_is_gone_counts_as_an_answer_that_was_lost(make, caplog):
    one = make("pod-b")
    old = one.put_fresh(obtained_at=one.now() - 20000, expires_at=one.now() + 1600)
    mark = fingerprint(old["refresh_token"])
    annotate(one.kube, **{SPENDS: f"{mark}/pod-a"})
    one.pass_(60)
    login = one.store.load()
    assert login.refresh_error.code == tokens.ANSWER_LOST and login.refresh_try.tries == 3
    assert logged(caplog, "another refresher (pod-a) has claimed the refresh token in the Secret")
    assert one.kube.claim() == f"{mark}/pod-a" and sent(one.sandbox) == 0
    # The late try, 600 s before the token expires.
    one.pass_(900)
    assert sent(one.sandbox) == 0
    one.pass_(200)
    assert sent(one.sandbox) == 1 and one.token() != old["access_token"]
    assert one.kube.published()["access_token"] == one.token()


def test_an_own_claim_from_before_a_restart_is_no_obstacle(make):
    one = make()
    old = one.put_stale()
    annotate(one.kube, **{SPENDS: fingerprint(old["refresh_token"]) + "/pod-a"})
    one.pass_()
    assert one.token() != old["access_token"]


# as a process


@mounts
def test_outside_of_a_cluster_it_does_not_start(sandbox, kube: Kube, tmp_path: Path):
    path = tmp_path / "tokens.json"
    for environ in ({}, kube.environ):
        process = Process(sandbox, path, XAI_PROXY_PUBLISH=PUBLISH, **environ)
        try:
            assert process.wait() == 78
            assert process.lines[0].startswith(
                f"xai-refresher: XAI_PROXY_PUBLISH={PUBLISH} requires a pod with a service account"
            )
        finally:
            process.close()


@pytest.fixture
def start(sandbox, kube: Kube, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """start(name) starts a pod's refresher of tokens of 8 s; its volume is named as the pod."""
    sandbox.set(device_interval=0, access_token_lifetime=8)
    started: list[Process] = []

    def start(name: str, volume: str) -> Process:
        folder = tmp_path / volume
        folder.mkdir(exist_ok=True)
        process = Process(
            sandbox,
            folder / "tokens.json",
            before=in_pod(kube.account),
            XAI_PROXY_PUBLISH=PUBLISH,
            # Nothing listens there: the API server is never reached through a proxy.
            HTTPS_PROXY="http://127.0.0.1:1",
            POD_UID=name,
            **kube.environ,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.close()


def is_published(kube: Kube, store: TokenStore) -> bool:
    return kube.published().get("access_token") == store.load().access_token


@mounts
def test_an_api_server_that_hangs_and_goes_on(sandbox, kube: Kube, tmp_path: Path, start):
    process = start("pod-a", "volume")
    store = make_store(sandbox, process.path)
    sandbox.write_login(process.path)
    process.wait_for("published in the Secret")
    kube.signal(signal.SIGSTOP)
    try:
        process.wait_for("sent no complete response within", 20)
    finally:
        kube.signal(signal.SIGCONT)
    renewed = process.logged("refreshed; ")
    wait_until(lambda: process.logged("refreshed; ") > renewed and is_published(kube, store), 20)
    assert sandbox.counters()["reuses"] == 0


@mounts
def test_two_refreshers_with_a_copy_of_the_volume_each_and_kills(
    sandbox, kube: Kube, tmp_path: Path, start
):
    first = start("pod-a", "volume")
    store = make_store(sandbox, first.path)
    login = sandbox.write_login(first.path)
    first.wait_for("refreshed; ")
    second = start("pod-b", "copy")
    second.path.write_text(json.dumps(login))
    second.wait_for("holds a newer login than the token file", 20)
    for number in range(2):
        renewed = first.logged("refreshed; ")
        wait_until(lambda: first.logged("refreshed; ") > renewed, 20)
        first.process.kill()
        first.wait()
        first = start(f"pod-{number}", "volume")
    wait_until(lambda: first.logged("refreshed; ") and is_published(kube, store), 20)
    assert make_store(sandbox, second.path).load().refresh_token == login["refresh_token"]
    counters = sandbox.counters()
    assert counters["reuses"] == counters["revoked_families"] == 0 and counters["refreshes"] >= 3


@mounts
@pytest.mark.parametrize("grace", [0, 60])
def test_a_kill_between_the_claim_and_the_answer(
    sandbox, kube: Kube, tmp_path: Path, start, grace: int
):
    """The pod that replaces the killed one renews the login, or publishes that it has ended."""
    first = start("pod-a", "volume")
    login = sandbox.write_login(first.path)
    slow = {"path": TOKEN_ENDPOINT, "grant_type": "refresh_token", "delay": 30}
    sandbox.set(answers=[slow], grace=grace)
    sandbox.wait(lambda counters: counters["refreshes"] == 1)
    first.process.kill()
    first.wait()
    claim = kube.claim()
    assert claim == f"{fingerprint(login['refresh_token'])}/pod-a"
    sandbox.set(answers=[])
    second = start("pod-b", "volume")
    second.wait_for("another refresher (pod-a) has claimed the refresh token")
    store = make_store(sandbox, second.path)
    if grace:
        wait_until(lambda: store.load().refresh_token != login["refresh_token"], 20)
        wait_until(lambda: is_published(kube, store))
    else:
        wait_until(lambda: kube.published().get("refresh_error"), 20)
        error = kube.published()["refresh_error"]
        assert (error["code"], error["terminal"]) == ("invalid_grant", True)
        assert kube.published()["access_token"] == login["access_token"]

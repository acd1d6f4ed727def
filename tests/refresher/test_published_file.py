"""XAI_PROXY_PUBLISH=file:/path: what is published, what is never replaced, and how a failure shows."""

import dataclasses
import fcntl
import json
import logging
import os
import stat
import time

import pytest
from refresher_process import Process, make_store, mounted, mounts
from token_files import save

from xaiproxy import config, errors, login_metrics, refresher_status, token_json, tokens
from xaiproxy.refresher.process import Refresher
from xaiproxy.refresher.publisher import CHECK_INTERVAL
from xaiproxy.token_store import TokenStore

NOW = 1_800_000_000.0
LOGIN = tokens.Login(
    "first-access",
    NOW + 21600,
    "first-refresh",
    "https://auth.x.ai/oauth2/token",
    NOW,
    scope="api:access",
    account="a@example.org",
    refresh_try=tokens.RefreshTry(tokens.fingerprint("first-refresh"), NOW, 1, NOW),
    asked=tokens.Asked(NOW, 120),
    salt="salt",
    extra={"of_another_program": "a secret"},
)
NEXT = dataclasses.replace(
    LOGIN, access_token="next-access", refresh_token="next-refresh", obtained_at=NOW + 100
)


class Scene:
    """A refresher, on a clock of its own, of a login that needs no refresh."""

    def __init__(self, folder):
        self.path = folder / "copy" / "login.json"
        self.path.parent.mkdir(mode=0o700)
        environ = {
            "XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json"),
            "XAI_PROXY_PUBLISH": f"file:{self.path}",
        }
        self.settings = config.from_environ(environ, dotenv_path=os.devnull)
        self.store = TokenStore(self.settings)
        self.seconds = 0.0
        self.start()

    def start(self) -> None:
        self.refresher = Refresher(
            self.settings,
            clock=lambda: NOW + self.seconds,
            uptime=lambda: self.seconds,
            sleep=self._sleep,
        )
        self.refresher.begin()

    def _sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def put(self, login: tokens.Login) -> None:
        save(self.store, login)

    def pass_(self, seconds: float = 0.25) -> None:
        end = self.seconds + seconds
        while self.seconds < end:
            self.refresher.turn()

    def held(self) -> dict:
        return json.loads(self.path.read_text())

    def status(self) -> refresher_status.Status:
        return refresher_status.filed(self.store)


@pytest.fixture
def scene(tmp_path, caplog) -> Scene:
    caplog.set_level(logging.INFO, "xaiproxy")
    return Scene(tmp_path)


def logged(caplog, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


def test_a_login_is_published_without_what_could_refresh_it(scene, caplog):
    scene.put(LOGIN)
    scene.pass_()
    assert scene.held() == {
        "access_token": "first-access",
        "expires_at": NOW + 21600,
        "token_endpoint": "https://auth.x.ai/oauth2/token",
        "obtained_at": NOW,
        "issuer": "https://auth.x.ai",
        "client_id": config.DEFAULT_CLIENT_ID,
        "scope": "api:access",
        "account": "a@example.org",
        "refresh_error": None,
        "salt": "salt",
    }
    assert stat.S_IMODE(scene.path.stat().st_mode) == 0o600
    assert os.listdir(scene.path.parent) == ["login.json"]
    assert scene.status().published_at == NOW
    assert logged(caplog, f"published in {scene.path}") == 1
    # A reader loads it.
    assert token_json.from_json(scene.path.read_bytes()).refresh_token is None


def test_each_new_login_is_published_at_once_and_the_mode_for_readers_is_kept(scene):
    scene.put(LOGIN)
    scene.pass_()
    scene.path.chmod(0o664)
    scene.put(NEXT)
    scene.pass_()
    assert scene.held()["access_token"] == "next-access"
    assert stat.S_IMODE(scene.path.stat().st_mode) == 0o644
    assert scene.status().published_at == NOW + 0.25


def test_only_the_end_of_a_login_is_published_of_its_failures(scene):
    mark = tokens.fingerprint("first-refresh")
    error = tokens.RefreshError("issuer_unavailable", "no answer", NOW, retry_at=NOW, token=mark)
    scene.put(dataclasses.replace(LOGIN, refresh_error=error))
    scene.pass_()
    assert scene.held()["refresh_error"] is None
    scene.put(dataclasses.replace(LOGIN, refresh_error=dataclasses.replace(error, terminal=True)))
    scene.pass_()
    read = token_json.from_json(scene.path.read_bytes()).refresh_error
    assert read.terminal and read.code == "issuer_unavailable" and read.token is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"{}", None])
def test_what_another_writer_has_put_there_is_replaced_within_a_minute(scene, content, caplog):
    scene.put(LOGIN)
    scene.pass_()
    before = scene.path.read_bytes()
    if content is None:
        scene.path.unlink()
    else:
        scene.path.write_bytes(content)
    scene.pass_(CHECK_INTERVAL - 0.25)
    assert not scene.path.exists() or scene.path.read_bytes() == content
    scene.pass_()
    assert scene.path.read_bytes() == before
    assert logged(caplog, "was changed by another writer; published again") == 1
    assert scene.status().publish_failures == 0


def test_a_newer_login_is_never_replaced_by_an_older_one(scene, caplog):
    scene.put(NEXT)
    scene.pass_()
    newer = scene.path.read_bytes()
    # As from a backup.
    scene.put(LOGIN)
    scene.start()
    scene.pass_(300)
    assert scene.path.read_bytes() == newer
    status = scene.status()
    assert status.publish_failure.startswith(
        f"{scene.path} holds a newer login than the token file;"
    )
    assert 5 <= status.publish_failures <= 15
    assert logged(caplog, "the login is not published: ") == 1
    # A later sign-in ends that.
    scene.put(dataclasses.replace(NEXT, access_token="third-access", obtained_at=NOW + 200))
    scene.pass_(CHECK_INTERVAL)
    assert scene.held()["access_token"] == "third-access" and not scene.status().publish_failure


def test_a_file_with_a_refresh_token_is_never_replaced(scene):
    other = token_json.to_json(dataclasses.replace(LOGIN, obtained_at=1), None)
    scene.path.write_text(other)
    scene.put(LOGIN)
    scene.pass_(10)
    assert scene.path.read_text() == other
    assert "holds a refresh token, which is left there" in scene.status().publish_failure


@pytest.mark.parametrize("name", ["tokens.json", "tokens.json.new", "tokens.json.lock"])
def test_the_token_file_and_its_siblings_are_refused_as_a_target(tmp_path, name):
    environ = {
        "XAI_PROXY_TOKEN_PATH": str(tmp_path / "tokens.json"),
        "XAI_PROXY_PUBLISH": f"file:{tmp_path / name}",
    }
    with pytest.raises(errors.ConfigurationError, match="XAI_PROXY_PUBLISH must not be /"):
        Refresher(config.from_environ(environ, dotenv_path=os.devnull))


def test_a_login_without_a_refresh_token_is_not_published(scene):
    scene.put(dataclasses.replace(LOGIN, refresh_token=None))
    scene.pass_(1)
    assert not scene.path.exists() and scene.status().publish_failures == 0


def test_a_failure_is_retried_with_backoff_counted_and_shown(scene, caplog):
    scene.path.parent.rmdir()
    scene.put(LOGIN)
    scene.pass_(120)
    failures = scene.status().publish_failures
    # Waits of 1, 2, 4 … 60 seconds, each less up to a half.
    assert 7 <= failures <= 10
    reason = f"{scene.path} cannot be written: No such file or directory. "
    assert scene.status().publish_failure.startswith(reason)
    assert logged(caplog, "the login is not published: ") == 1
    # The count survives a restart.
    scene.start()
    scene.pass_()
    assert scene.status().publish_failures == failures + 1
    found = {
        sample.name: sample.value
        for family in login_metrics.families(scene.store, NOW + scene.seconds)
        for sample in family.samples
    }
    assert found["xaiproxy_publish_failures_total"] == failures + 1
    assert found["xaiproxy_published_timestamp_seconds"] == 0
    scene.path.parent.mkdir()
    scene.pass_(60)
    status = scene.status()
    assert scene.held()["access_token"] == "first-access"
    assert not status.publish_failure and status.published_at > NOW + 120


def test_a_planted_file_is_left_alone_and_the_link_is_not_followed(scene, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    scene.path.symlink_to(victim)
    (scene.path.parent / "login.json.new").symlink_to(victim)
    scene.put(LOGIN)
    scene.pass_()
    assert victim.read_text() == "kept" and scene.path.is_symlink()
    assert "it is a symbolic link" in scene.status().publish_failure
    scene.path.unlink()
    scene.pass_(2)
    assert victim.read_text() == "kept" and scene.held()["access_token"] == "first-access"


def test_a_folder_that_another_refresher_has_locked_is_tried_again(scene):
    fd = os.open(scene.path.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    scene.put(LOGIN)
    scene.pass_()
    assert not scene.path.exists()
    assert scene.status().publish_failure == f"{scene.path.parent} is locked by another process"
    os.close(fd)
    scene.pass_(2)
    assert scene.held()["access_token"] == "first-access"


# as a process


def put_stale(sandbox, path) -> dict:
    now = time.time()
    return sandbox.write_login(path, obtained_at=now - 1000, expires_at=now + 100)


@mounts
def test_a_refresh_succeeds_though_the_published_file_has_no_room(sandbox, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    path = tmp_path / "tokens.json"
    old = put_stale(sandbox, path)
    process = Process(
        sandbox,
        path,
        before=mounted('mount -t tmpfs -o size=4k none "$1"; echo x > "$1"/full', folder),
        XAI_PROXY_PUBLISH=f"file:{folder / 'login.json'}",
    )
    try:
        process.wait_for("the login is not published: ")
        assert process.logged("refreshed; ") == 1 and process.logged("No space left on device") == 1
        assert make_store(sandbox, path).load().access_token != old["access_token"]
    finally:
        process.close()


def test_once_publishes_too_and_its_exit_status_is_the_refreshs(sandbox, tmp_path):
    path, copy = tmp_path / "tokens.json", tmp_path / "copy" / "login.json"
    put_stale(sandbox, path)
    process = Process(sandbox, path, "--once", XAI_PROXY_PUBLISH=f"file:{copy}")
    try:
        assert process.wait() == 0
        assert process.logged(f"the login is not published: {copy} cannot be written") == 1
    finally:
        process.close()
    copy.parent.mkdir()
    process = Process(sandbox, path, "--once", XAI_PROXY_PUBLISH=f"file:{copy}")
    try:
        assert process.wait() == 0
        token = make_store(sandbox, path).load().access_token
        assert json.loads(copy.read_text())["access_token"] == token
    finally:
        process.close()
    status = refresher_status.filed(make_store(sandbox, path))
    assert status.publish_failures == 1 and status.published_at

"""xai-login --doctor: its line about each possible fault, and that it changes nothing."""

from __future__ import annotations

import email.utils
import fcntl
import io
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest
from proxy_process import ISSUER, ProxyProcess, environment
from refresher_process import Process
from sandbox import Sandbox
from scripted_server import ScriptedServer, answer
from terminal import CTRL_C, Terminal

from xaiproxy import config, dotenv_file, judgement, token_writer
from xaiproxy.judgement import Judgement, Verdict
from xaiproxy.login import doctor, doctor_files, doctor_network, finding, local_proxy
from xaiproxy.login.output import Output
from xaiproxy.token_store import TokenStore

COMMAND = [
    sys.executable,
    "-W",
    "error",
    "-c",
    "import sys; from xaiproxy.login import command as login; sys.exit(login.main())",
    "--doctor",
]
SIGNED_IN = Judgement(Verdict.GOOD, True, 0, "signed in")
NO_LOGIN = Judgement(Verdict.NO_LOGIN, False, 77, "not signed in")
# Nothing is listening there.
CLOSED = "http://127.0.0.1:1"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class Report:
    """The findings, as (result, message, exit code), by check and in order."""

    def __init__(self, lines: str, code: int):
        *events, self.end = map(json.loads, lines.splitlines())
        self.text, self.code = lines, code
        self.order = list(dict.fromkeys(event["check"] for event in events))
        self.found: dict[str, list[tuple[str, str, int]]] = {check: [] for check in self.order}
        for event in events:
            self.found[event["check"]].append(
                (event["result"], event["message"], event.get("exit_code", 0))
            )
        failed = [event["exit_code"] for event in events if event["result"] == "failure"]
        assert code == (failed[0] if failed else 0)
        assert self.end == {
            "event": "doctor",
            "failures": len(failed),
            "exit_code": code,
            "warnings": sum(event["result"] == "warning" for event in events),
        }

    def shows(self, check: str, result: str, message: str, exit_code: int = 0) -> None:
        """Assert that there is this finding; `message` is a regular expression."""
        assert [
            found
            for found in self.found[check]
            if found[::2] == (result, exit_code) and re.search(message, found[1])
        ], self.found[check]


class Patient:
    """A login in tmp_path, of the sandbox, and settings of its own; the proxy's port is closed."""

    def __init__(self, sandbox: Sandbox, folder: Path):
        self.sandbox = sandbox
        self.folder = folder / "login"
        self.path = self.folder / "tokens.json"
        self.environ = {
            "XAI_PROXY_ISSUER": sandbox.url,
            "XAI_PROXY_UPSTREAM": sandbox.url,
            "XAI_PROXY_PORT": "1",
            "XAI_PROXY_TOKEN_PATH": str(self.path),
            "XAI_PROXY_MAX_CONNECTIONS": "10",
        }

    def examine(
        self,
        now: Callable[[], float] = time.time,
        pause: Callable[[float], object] = lambda _: None,
        **environ: str,
    ) -> Report:
        lines = io.StringIO()
        environ = self.environ | {
            f"XAI_PROXY_{name}" if f"XAI_PROXY_{name}" in config.SETTINGS else name: text
            for name, text in environ.items()
        }
        code = doctor.examine(environ, {}, Output(True, stdout=lines), now, pause)
        return Report(lines.getvalue(), code)

    def process(self, prefix: list[str], arguments: tuple[str, ...] = (), **environ: str) -> Report:
        """Run the command, after `prefix`; an empty value in `environ` unsets that variable."""
        environ = environment(self.folder) | self.environ | environ
        done = subprocess.run(
            [*prefix, *COMMAND, "--json", *arguments],
            text=True,
            capture_output=True,
            timeout=30,
            cwd="/",
            env={name: text for name, text in environ.items() if text},
        )
        assert done.stderr == ""
        return Report(done.stdout, done.returncode)

    def sign_in(self, **members: Any) -> dict[str, Any]:
        login = self.sandbox.write_login(self.path, **members)
        self.sandbox.reset()
        return login

    def refresher_lives(self, age: float = 0) -> None:
        lock = self.folder / "tokens.json.lock"
        lock.touch(0o600)
        os.utime(lock, (time.time() - age,) * 2)


@pytest.fixture
def patient(sandbox: Sandbox, tmp_path: Path) -> Iterator[Patient]:
    before = os.getcwd()
    # This folder has no .env.
    os.chdir(tmp_path)
    yield Patient(sandbox, tmp_path)
    os.chdir(before)


@pytest.fixture
def other_user() -> list[str]:
    """A prefix that runs a command as a user without a name or privileges; our files seem its own."""
    prefix = ["unshare", "--user", "--map-user=12345"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("unshare --map-user does not work here")
    return prefix


def snapshot(folder: Path) -> dict[str, tuple]:
    return {
        path.name: (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, path.read_bytes())
        for path in folder.iterdir()
        for status in [path.stat()]
    }


def tokens_sent(sandbox: Sandbox) -> list[str]:
    """The targets of the requests that carried a token."""
    return [
        request["target"]
        for request in sandbox.requests()
        if any(name.lower() == "authorization" for name, _ in request["headers"])
    ]


# the whole report


def test_a_sound_setup_has_no_finding_and_stays_unchanged(
    patient: Patient, sandbox: Sandbox, tmp_path: Path
):
    login = patient.sign_in(account="you@example.org")
    patient.refresher_lives()
    (patient.folder / "tokens.json.new").write_text("left over")
    with (
        ProxyProcess(patient.folder, issuer=sandbox.url, upstream=sandbox.url) as proxy,
        open(patient.folder / "tokens.json.lock") as lock,
    ):
        # A writer that took the lock would wait until the end of the test.
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = snapshot(patient.folder)
        report = patient.examine(PORT=str(proxy.port))
        assert snapshot(patient.folder) == before
    assert report.order == [
        "settings",
        "network",
        "login",
        "token folder",
        "refresher",
        "issuer",
        "upstream",
        "clock",
        "file descriptors",
        "client keys",
        "proxy",
    ]
    assert {found[0] for check in report.found.values() for found in check} == {"ok"}
    report.shows(
        "settings", "ok", f"^the login of {sandbox.url} in {patient.path}, for {sandbox.url}$"
    )
    report.shows(
        "login",
        "ok",
        f"^signed in as you@example.org, in {patient.path}. The access token is valid until 20.*, "
        "for another 5 h 59 min",
    )
    report.shows("proxy", "ok", f"^serving http://127.0.0.1:{proxy.port}/v1, and ready: signed in$")
    asked = [(request["method"], request["target"]) for request in sandbox.requests()]
    assert asked == [
        ("GET", "/.well-known/openid-configuration"),
        ("GET", "/v1/me"),
        ("GET", "/v1/models"),
    ]
    assert tokens_sent(sandbox) == ["/v1/me", "/v1/models"]
    assert login["access_token"] not in report.text and login["refresh_token"] not in report.text


def test_a_terminal_shows_each_line_as_soon_as_it_is_known(patient: Patient):
    with ScriptedServer(lambda connection: connection.recv(65536) and connection.recv(1)) as silent:
        environ = (
            environment(patient.folder)
            | patient.environ
            | {"XAI_PROXY_ISSUER": silent.url, "COLUMNS": "100"}
        )
        with Terminal(COMMAND, env=environ, cwd="/") as terminal:
            terminal.expect(r"ok +settings: .*\r\n")
            terminal.expect(
                r"FAILED   login: not signed in: .*; run `\S+/bin/xai-login --device` to sign "
                r"in\r\n"
            )
            # The line shown while it waits.
            terminal.expect(r"\r\x1b\[K\.\.\.      issuer$", 5)
            terminal.type(CTRL_C)
            assert terminal.end() == 130 and "Traceback" not in terminal.screen


def test_a_terminal_names_the_check_that_is_running(patient: Patient, sandbox: Sandbox):
    patient.sign_in()
    sandbox.set(answers=[{"path": "/v1/models", "delay": 60}])
    with Terminal(COMMAND, env=environment(patient.folder) | patient.environ, cwd="/") as terminal:
        terminal.expect(r"/v1/me accepts the token\r\n\r\x1b\[K\.\.\.      upstream$", 5)


@pytest.mark.parametrize(
    "well, last",
    [
        (False, r"2 failures, \d warnings?; start with the first failure\."),
        (True, r"No failure, \d warnings?\."),
    ],
)
def test_the_last_line_and_the_exit_code(patient: Patient, well: bool, last: str):
    """A stopped refresher and a stopped proxy are warnings."""
    if well:
        patient.sign_in()
    environ = environment(patient.folder) | patient.environ
    environ |= {} if well else {"XAI_PROXY_CLIENT_KEYS_FILE": "/missing"}
    done = subprocess.run(COMMAND, text=True, capture_output=True, timeout=30, cwd="/", env=environ)
    assert (done.returncode, done.stderr) == (0 if well else 77, "")
    assert re.fullmatch(last, done.stdout.splitlines()[-1])
    assert all(
        line.startswith(tuple(f"{label:8} " for label in finding.LABELS.values()))
        for line in done.stdout.splitlines()[:-1]
    )


# settings


@pytest.mark.parametrize(
    "environ, message, doubtful",
    [
        (
            {"ISSUER": "http://192.0.2.1"},
            "^XAI_PROXY_ISSUER must be an https URL",
            {"network", "login", "issuer", "upstream"},
        ),
        (
            {"XAI_PROXY_UPSTRAEM": "x"},
            "did you mean XAI_PROXY_UPSTREAM?",
            {"network", "login", "upstream"},
        ),
        ({"CLIENT_ID": " "}, "^XAI_PROXY_CLIENT_ID", {"login", "upstream"}),
        ({"PORT": "http"}, "^XAI_PROXY_PORT", {"proxy"}),
        ({"BIND": "here"}, "^XAI_PROXY_BIND", {"client keys", "proxy"}),
        ({"MAX_CONNECTIONS": "0"}, "^XAI_PROXY_MAX_CONNECTIONS", {"file descriptors"}),
        (
            {"TOKEN_PATH": "/"},
            "^XAI_PROXY_TOKEN_PATH",
            {"login", "token folder", "refresher", "upstream", "client keys"},
        ),
        (
            {"https_proxy": "ftp://me:secret@p"},
            "^https_proxy must be the URL",
            {"network", "issuer", "upstream"},
        ),
        (
            {"SSL_CERT_FILE": "/none"},
            "^SSL_CERT_FILE must be a file of PEM",
            {"network", "issuer", "upstream"},
        ),
        ({"XAI_PROXY_WHATEVER_THIS": "1"}, "lists them all", set()),
        ({"LOG_LEVEL": "loud"}, "^XAI_PROXY_LOG_LEVEL", set()),
    ],
)
def test_a_wrong_setting_is_a_failure_and_independent_checks_still_run(
    patient: Patient, environ: dict[str, str], message: str, doubtful: set[str]
):
    patient.sign_in()
    report = patient.examine(**environ)
    report.shows("settings", "failure", message, 78)
    assert (report.code, len(report.found["settings"]), len(report.order)) == (78, 1, 11)
    assert {
        check for check, found in report.found.items() if found[0][0] == "skipped"
    } == doubtful | ({"clock"} if {"issuer", "upstream"} <= doubtful else set())
    assert "secret" not in report.text


def test_every_wrong_setting_is_reported(patient: Patient):
    report = patient.examine(PORT="x", ISSUER="y", XAI_PROXY_ISUER="z", ALL_PROXY="socks://p")
    assert [found[1].split()[0] for found in report.found["settings"]] == [
        "XAI_PROXY_ISUER",
        "XAI_PROXY_PORT",
        "XAI_PROXY_ISSUER",
        "ALL_PROXY",
    ] or report.found["settings"]


def test_an_unreadable_dotenv_makes_every_setting_doubtful(patient: Patient, sandbox: Sandbox):
    patient.sign_in()
    Path(".env").write_bytes(b"#" * (dotenv_file.SIZE_LIMIT + 1))
    report = patient.examine()
    report.shows("settings", "failure", r"/\.env cannot be read", 78)
    assert {found[0][0] for check, found in report.found.items() if check != "settings"} == {
        "skipped"
    }
    assert sandbox.requests() == []


def test_without_a_home_folder_the_token_file_is_not_checked(
    patient: Patient, other_user: list[str]
):
    report = patient.process(other_user, HOME="", XAI_PROXY_TOKEN_PATH="", XAI_PROXY_PORT="http")
    report.shows(
        "settings", "failure", "^XAI_PROXY_TOKEN_PATH must be .* no home directory is known", 78
    )
    assert report.order == ["settings"]


def test_a_setting_of_a_client_is_a_warning(patient: Patient):
    patient.examine(XAI_PROXY_KEY="secret").shows(
        "settings", "warning", "^XAI_PROXY_KEY is not a setting"
    )


# the login


def test_token_path_names_the_file_that_is_checked(patient: Patient):
    patient.sign_in()
    report = patient.process([], arguments=("--token-path", f"{patient.folder}/other"))
    report.shows("login", "failure", "/other does not exist", 77)


def test_a_missing_login_is_a_failure(patient: Patient, sandbox: Sandbox):
    report = patient.examine()
    report.shows(
        "login",
        "failure",
        f"^not signed in: {patient.path} does not exist; run `\\S*bin/xai-login --device`",
        77,
    )
    report.shows("token folder", "skipped", "does not exist; signing in creates it")
    report.shows("upstream", "ok", "answers; no token was sent")
    assert not patient.folder.exists() and tokens_sent(sandbox) == []


@pytest.mark.parametrize(
    "members, exit_code, message",
    [
        (
            {"issuer": "https://auth.x.ai"},
            78,
            "holds a login of https://auth.x.ai for client .*set XAI_PROXY_ISSUER",
        ),
        ({"client_id": "another"}, 78, "for client another, but the settings are"),
        (
            {"access_token": "two words"},
            77,
            "holds no access_token .* run `\\S*bin/xai-login --device`",
        ),
    ],
)
def test_a_login_that_is_not_for_these_settings_is_sent_nowhere(
    patient: Patient, sandbox: Sandbox, members: dict[str, Any], exit_code: int, message: str
):
    patient.sign_in(**members)
    patient.examine().shows("login", "failure", message, exit_code)
    assert tokens_sent(sandbox) == []


def test_a_token_of_xai_is_sent_to_xai_only(patient: Patient, sandbox: Sandbox):
    patient.sign_in(issuer="https://auth.x.ai")
    report = patient.examine(ISSUER="https://auth.x.ai", HTTPS_PROXY=CLOSED)
    report.shows(
        "login",
        "failure",
        r"whose tokens go to https on \*\.x\.ai only, but XAI_PROXY_UPSTREAM is",
        78,
    )
    assert [request["target"] for request in sandbox.requests()] == ["/v1/me"] and tokens_sent(
        sandbox
    ) == []


def test_a_file_that_is_no_login_is_a_failure(patient: Patient):
    patient.sign_in()
    patient.path.write_text("{half")
    patient.examine().shows("login", "failure", "is not JSON: .*kept aside", 77)
    patient.path.unlink()
    os.mkfifo(patient.path)
    patient.examine().shows("login", "failure", "is not a file; move it away", 75)


def test_a_link_to_a_login_is_a_failure(patient: Patient):
    patient.sign_in()
    patient.path.rename(patient.folder / "elsewhere")
    patient.path.symlink_to("elsewhere")
    patient.examine().shows(
        "login", "failure", "is a symbolic link .*put the file itself there", 77
    )


@as_root
def test_a_login_of_another_user_is_a_failure(patient: Patient):
    patient.sign_in()
    os.chown(patient.path, 12345, 12345)
    patient.examine().shows("login", "failure", "belongs to user 12345.*run as that user", 75)


def test_a_file_that_others_may_read_is_a_warning(patient: Patient):
    patient.sign_in()
    patient.path.chmod(0o640)
    report = patient.examine()
    report.shows("login", "warning", r"is open to other users \(mode 0640\); chmod 600 it")
    report.shows("login", "ok", "is valid until")
    assert stat.S_IMODE(patient.path.stat().st_mode) == 0o640
    # A mounted Secret has the mode that it was mounted with.
    patient.sign_in(refresh_token=None)
    assert "other users" not in patient.examine().text


FAILED = {"code": "503", "description": "auth.x.ai answered HTTP 503", "at": 2000, "retry_at": 2060}
ENDED = {"code": "invalid_grant", "description": "revoked\x1b[2J", "at": 2000, "terminal": True}


@pytest.mark.parametrize(
    "members, alive, result, exit_code, message",
    [
        ({}, True, "ok", 0, "is valid until .* for another 5 h 59 min"),
        (
            {"refresh_error": FAILED},
            True,
            "warning",
            0,
            "answered HTTP 503. The next try is due at",
        ),
        (
            {"refresh_error": ENDED},
            True,
            "failure",
            77,
            r"revoked \[2J. It will not be tried again; run `\S*bin/xai-login",
        ),
        (
            {"refresh_token": None},
            True,
            "warning",
            0,
            "no refresh token and cannot be renewed: the login lapses at",
        ),
        (
            {"expires_at": 1000, "refresh_token": None},
            True,
            "failure",
            77,
            "login lapsed at .* Replace the file, or run",
        ),
        (
            {"expires_at": 1000},
            True,
            "failure",
            75,
            "expired at 1970.* running and should renew it: try again in a minute",
        ),
        (
            {"expires_at": 1000, "refresh_error": FAILED},
            True,
            "failure",
            75,
            "expired at 1970.*answered HTTP 503",
        ),
        (
            {"expires_at": 1000},
            False,
            "warning",
            0,
            "expired at 1970.* renewed once the refresher runs",
        ),
    ],
)
def test_the_time_left_of_a_login_is_reported(
    patient: Patient,
    sandbox: Sandbox,
    members: dict[str, Any],
    alive: bool,
    result: str,
    exit_code: int,
    message: str,
):
    patient.sign_in(**members)
    if alive:
        patient.refresher_lives()
    patient.examine().shows("login", result, message, exit_code)
    # An expired token is sent nowhere, as in the proxy.
    assert bool(tokens_sent(sandbox)) is ("expires_at" not in members)


# the folder


@pytest.mark.parametrize(
    "mode, warned", [(0o770, True), (0o702, True), (0o1777, False), (0o755, False)]
)
def test_a_folder_that_others_may_write_in_is_a_warning(patient: Patient, mode: int, warned: bool):
    patient.sign_in()
    patient.folder.chmod(mode)
    report = patient.examine()
    report.shows("token folder", "ok", "is writable, and its disk has room")
    assert ("may be written by other users" in report.text) is warned


@pytest.mark.parametrize(
    "script, message",
    [
        (
            "mount -t tmpfs -o size=1M none {0} && mount -o remount,ro {0}",
            "user 0 cannot write in .*mount it writable",
        ),
        (
            "cd {0}/.. && rmdir login && mount --bind . . && mount -o remount,bind,ro .",
            "/login does not exist, and user 0 cannot write in .*mount it writable",
        ),
        ("mount -t tmpfs -o size=32k none {0}", "the disk of .* is full.*make room"),
        (
            "touch {0}/tokens.json && mount -t tmpfs none /mnt && touch /mnt/t && "
            "mount --bind /mnt/t {0}/tokens.json",
            "is a mount of its own and.*mount .*/login instead",
        ),
    ],
)
def test_a_folder_that_cannot_be_written_is_a_failure(patient: Patient, script: str, message: str):
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    ).returncode:
        pytest.skip("unshare -rm cannot mount here")
    patient.folder.mkdir(0o700)
    report = patient.process(
        ["unshare", "-rm", "sh", "-c", script.format(patient.folder) + ' && exec "$@"', "sh"]
    )
    report.shows("token folder", "failure", message, 75)


def test_the_disk_needs_the_room_that_the_refresher_reserves():
    assert doctor_files.ROOM == token_writer.RESERVE


def test_a_folder_without_access_is_a_failure(patient: Patient, other_user: list[str]):
    patient.sign_in()
    for path, check, message in (
        (patient.folder, "token folder", "user 12345 cannot write in "),
        (patient.folder.parent, "token folder", "cannot be accessed .Permission denied"),
        (patient.folder.parent, "login", "cannot be read .Permission denied"),
    ):
        path.chmod(0)
        patient.process(other_user).shows(check, "failure", message, 75)
        path.chmod(0o700)


def test_the_folder_of_a_secret_may_be_read_only(patient: Patient):
    patient.sign_in(refresh_token=None)
    report = patient.examine()
    assert "token folder" not in report.order
    report.shows("refresher", "skipped", "no refresh token")


# the refresher


@pytest.mark.parametrize(
    "age, result, message",
    [
        (0, "ok", r"^running; its last heartbeat was \d s ago"),
        (55, "ok", "was 55 s ago"),
        (
            65,
            "warning",
            r"^not running \(last heartbeat 20.*start `.*bin/xai-serve`, "
            r"or `\S*bin/xai-refresher`",
        ),
        (-3600, "warning", "^not running"),
        (None, "warning", "no heartbeat so far"),
    ],
)
def test_the_age_of_the_heartbeat_is_reported(
    patient: Patient, age: float | None, result: str, message: str
):
    patient.sign_in()
    if age is not None:
        patient.refresher_lives(age)
    patient.examine().shows("refresher", result, message)


@pytest.fixture
def remote(sandbox: Sandbox, tmp_path: Path) -> Iterator[str]:
    """The URL of a refresher on another machine."""
    path = tmp_path / "remote" / "tokens.json"
    sandbox.write_login(path)
    process = Process(sandbox, path, XAI_PROXY_ASK_BIND="127.0.0.1:0")
    process.wait_for("proxies can ask at")
    yield re.search(r"proxies can ask at (http://[0-9.:]+)", "".join(process.lines))[1]
    process.close()


def test_a_refresher_on_another_machine_is_asked(patient: Patient, remote: str):
    patient.sign_in(refresh_token=None, issuer=CLOSED)
    report = patient.examine(REFRESHER=remote, ISSUER=CLOSED)
    report.shows("refresher", "ok", f"on another machine: {remote} answers, and ready: signed in")
    # Nothing here needs the issuer.
    report.shows("issuer", "skipped", "the refresher on another machine renews the login")
    report.shows("login", "ok", "The access token is valid until")
    assert "refresh token" not in report.text and "lapses" not in report.text


@pytest.mark.parametrize(
    "url, message",
    [
        (CLOSED, "cannot be asked .*Connection refused.*XAI_PROXY_REFRESHER"),
        (None, r"does not answer as a refresher does \(HTTP 404, .*\); correct XAI_PROXY_REFR"),
    ],
    ids=["closed", "another program"],
)
def test_a_refresher_on_another_machine_that_does_not_answer_is_a_warning(
    patient: Patient, url: str | None, message: str
):
    patient.sign_in(refresh_token=None)
    patient.examine(REFRESHER=url or patient.sandbox.url).shows("refresher", "warning", message)


def test_an_expired_login_from_another_machine_is_to_be_brought_here(patient: Patient):
    patient.sign_in(refresh_token=None, expires_at=1000)
    patient.examine(REFRESHER=CLOSED).shows(
        "login", "failure", "check its log, and what brings the token file here", 75
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda lock: lock.symlink_to("tokens.json"),
        lambda lock: lock.mkdir(),
        lambda lock: os.mkfifo(lock),
    ],
    ids=["link", "folder", "fifo"],
)
def test_a_lock_that_is_no_file_is_a_failure(patient: Patient, make: Callable[[Path], object]):
    patient.sign_in()
    make(patient.folder / "tokens.json.lock")
    patient.examine().shows(
        "refresher", "failure", "is not a regular file and cannot be locked; remove it", 75
    )


def test_a_lock_without_access_is_a_failure(patient: Patient, other_user: list[str]):
    patient.sign_in()
    patient.refresher_lives()
    (patient.folder / "tokens.json.lock").chmod(0o400)
    report = patient.process(other_user)
    report.shows("refresher", "failure", "tokens.json.lock is closed to user 12345", 75)
    report.shows("login", "ok", "is valid")


# the issuer


@pytest.mark.parametrize(
    "answers, message",
    [
        (
            [{"path": "/.well-known/*", "error": "cloudflare_challenge"}],
            r"returned no discovery document \(HTTP 403, text/h",
        ),
        (
            [{"path": "/.well-known/*", "body": {"issuer": "https://auth.x.ai"}}],
            "correct XAI_PROXY_ISSUER",
        ),
        (
            [{"path": "/.well-known/*", "cut": "reset"}],
            "closed the connection before its response was complete",
        ),
    ],
)
def test_an_issuer_that_does_not_work_is_a_failure(
    patient: Patient, sandbox: Sandbox, answers: list[dict[str, Any]], message: str
):
    patient.sign_in()
    sandbox.set(answers=answers)
    report = patient.examine()
    report.shows("issuer", "failure", message, 69)
    report.shows("upstream", "ok", "accepts the token")


def test_unreachable_servers_are_failures(patient: Patient):
    patient.sign_in(issuer=CLOSED)
    report = patient.examine(ISSUER=CLOSED, UPSTREAM=CLOSED)
    report.shows(
        "issuer",
        "failure",
        "127.0.0.1:1 cannot be reached .*check the network, or XAI_PROXY_ISSUER$",
        69,
    )
    report.shows(
        "upstream",
        "failure",
        "127.0.0.1:1 cannot be reached .*check the network, or XAI_PROXY_UPSTREAM$",
        69,
    )
    report.shows("clock", "skipped", "no server answered to compare it with; it is 20")
    assert report.code == 69 and len(report.found["upstream"]) == 1


# upstream

REFUSED = (
    "it refuses the access token, which has not expired; unless a request .*, "
    r"run `\S*bin/xai-login --device`"
)
PLAN = "the login is valid, but the account's plan or credit .*signing in again does not help"
PAGE = "with an HTML page: Cloudflare, or a proxy of your network"


@pytest.mark.parametrize(
    "error, exit_code, message",
    [
        ("bad_credentials", 77, "HTTP 403, unauthenticated:bad-credentials: " + REFUSED),
        ("bad_credentials_old", 77, "HTTP 403: " + REFUSED),
        ("no_credentials", 77, "HTTP 401, .*" + REFUSED),
        ("spending_limit", 77, "HTTP 402, personal-team-blocked:spending-limit: " + PLAN),
        ("spending_limit_403", 77, "HTTP 403, .*" + PLAN),
        ("no_subscription", 77, "HTTP 403: " + PLAN),
        ("blocked_user", 77, "HTTP 403, unauthorized:blocked-user: " + PLAN),
        ("chat_denied", 77, "HTTP 403, .*" + PLAN),
        ("rate_limited", 75, "HTTP 429, .* too many requests, .* try again in 1 s"),
        ("free_usage", 75, "HTTP 429, subscription:free-usage-exhausted: .* try again later"),
        ("internal", 69, "HTTP 500: a failure of the API"),
        ("bad_gateway", 69, "HTTP 502: a failure of the API"),
        ("web_server_down", 69, "HTTP 521: a failure of the API"),
        ("cloudflare_challenge", 69, "HTTP 403 " + PAGE),
        ("no_user_agent", 69, "HTTP 403 " + PAGE),
        ("no_route", 69, "HTTP 404, which is not a response of the API; check XAI_PROXY_UPSTREAM"),
    ],
)
def test_an_upstream_error_about_the_token_is_explained(
    patient: Patient, sandbox: Sandbox, error: str, exit_code: int, message: str
):
    patient.sign_in()
    for path in ("/v1/me", "/v1/models"):
        sandbox.set(answers=[{"path": path, "error": error}])
        report = patient.examine()
        report.shows("upstream", "failure", f"^{sandbox.url}{path} answered {message}", exit_code)
        assert report.code == exit_code
        assert len(report.found["upstream"]) == (
            1 if path == "/v1/me" and message.endswith(REFUSED) else 2
        )
        for words in (
            "OAuth2",
            "credits at",
            "Too many requests for team",
            "Cloudflare |",
            "No handler",
        ):
            # No body is printed.
            assert words not in report.text


@pytest.mark.parametrize(
    "scripted, message",
    [
        ({"status": 200, "body": "<html>Please log in</html>"}, "HTTP 200 " + PAGE),
        ({"status": 200, "body": "null"}, "HTTP 200, which is not a response of the API"),
        ({"status": 200, "body": {"data": "all"}}, ""),
    ],
)
def test_a_200_that_is_not_the_apis_is_a_failure(
    patient: Patient, sandbox: Sandbox, scripted: dict[str, Any], message: str
):
    patient.sign_in()
    sandbox.set(answers=[{"path": "/v1/*", **scripted}])
    patient.examine().shows("upstream", "failure", message, 69)


def test_a_redirect_is_not_followed_with_the_token(patient: Patient, sandbox: Sandbox):
    patient.sign_in()
    with ScriptedServer(answer(200, {})) as elsewhere:
        sandbox.set(
            answers=[{"path": "/v1/*", "status": 302, "headers": {"Location": elsewhere.url}}]
        )
        patient.examine().shows(
            "upstream", "failure", "HTTP 302, which is not a response of the API", 69
        )
    assert elsewhere.requests == []


def test_a_blocked_account_is_a_failure(patient: Patient, sandbox: Sandbox):
    patient.sign_in()
    sandbox.set(answers=[{"path": "/v1/me", "body": {"team_blocked": True}}])
    patient.examine().shows(
        "upstream", "failure", "the account is blocked.*signing in again does not help", 77
    )


def test_an_empty_list_of_models_is_a_warning(patient: Patient, sandbox: Sandbox):
    patient.sign_in()
    sandbox.set(answers=[{"path": "/v1/models", "body": {"object": "list", "data": []}}])
    report = patient.examine()
    report.shows("upstream", "warning", "/v1/models lists no models, as for some accounts")
    assert report.code == 0


def test_a_new_token_that_was_refused_is_retried(patient: Patient, sandbox: Sandbox):
    sandbox.set(refuse_fresh=1)
    sandbox.write_login(patient.path)
    pauses: list[float] = []
    patient.examine(pause=pauses.append).shows("upstream", "ok", "/v1/me accepts the token")
    assert pauses == [1]


def test_a_token_that_was_renewed_meanwhile_is_used(patient: Patient, sandbox: Sandbox):
    patient.sign_in()
    sandbox.kill()
    patient.examine(pause=lambda _: patient.sign_in()).shows(
        "upstream", "ok", "/v1/me accepts the token"
    )


def test_a_login_that_was_removed_meanwhile_is_a_failure(patient: Patient, sandbox: Sandbox):
    patient.sign_in()
    sandbox.kill()
    patient.examine(pause=lambda _: patient.path.unlink()).shows("upstream", "failure", REFUSED, 77)


@pytest.mark.parametrize(
    "error, message", [("cloudflare_challenge", PAGE), ("unavailable", "HTTP 503")]
)
def test_an_upstream_that_does_not_work_is_a_failure_without_a_login(
    patient: Patient, sandbox: Sandbox, error: str, message: str
):
    sandbox.set(answers=[{"path": "/v1/me", "error": error}])
    patient.examine().shows("upstream", "failure", message, 69)


# the route


def test_the_proxy_on_the_route_is_named_without_its_password(patient: Patient, tmp_path: Path):
    ca = str(shutil.copy(certifi.where(), tmp_path / "ca.pem"))
    patient.sign_in(issuer="https://auth.example")
    with ScriptedServer(answer(403)) as proxy:
        host = proxy.url.removeprefix("http://")
        report = patient.examine(
            ISSUER="https://auth.example",
            UPSTREAM="https://api.example",
            https_proxy=f"http://me:secret@{host}",
            NO_PROXY="none.example",
            SSL_CERT_FILE=ca,
        )
    through = rf"through {proxy.url} \(https_proxy\)"
    report.shows(
        "network",
        "ok",
        rf"^auth.example {through} and api.example {through}; CA certificates of {ca} "
        r"\(SSL_CERT_FILE\)$",
    )
    report.shows(
        "issuer",
        "failure",
        rf"^could not reach auth.example through the proxy {host} \(HTTP 403\)",
        69,
    )
    report.shows(
        "upstream",
        "failure",
        rf"^could not reach api.example through the proxy {host} \(HTTP 403\)",
        69,
    )
    assert [request.split()[:2] for request in proxy.requests] == [
        [b"CONNECT", b"auth.example:443"],
        [b"CONNECT", b"api.example:443"],
    ]
    assert "secret" not in report.text


def settings(**environ: str) -> config.Config:
    return config.from_environ(environ, dotenv_path=os.devnull)


@pytest.mark.parametrize(
    "environ, message",
    [
        (
            {},
            "auth.x.ai directly and api.x.ai directly; CA certificates of .* "
            "(certifi, the default)",
        ),
        (
            {"ALL_PROXY": "socks5h://me:secret@[::2]:1", "NO_PROXY": "api.x.ai"},
            "auth.x.ai through socks5h://[::2]:1 (ALL_PROXY) and api.x.ai directly (NO_PROXY)",
        ),
        (
            {"HTTPS_PROXY": "p:1", "XAI_PROXY_ISSUER": CLOSED, "XAI_PROXY_UPSTREAM": CLOSED},
            "127.0.0.1:1 directly (loopback)",
        ),
    ],
)
def test_the_route_is_described(environ: dict[str, str], message: str):
    finding = doctor_network.routes(settings(**environ))
    assert finding.result == "ok" and re.match(
        re.escape(message).replace(r"\.\*", ".*"), finding.message
    ), finding


# the clock


@pytest.mark.parametrize(
    "ahead, result, message",
    [
        ({"a": 60.0}, "ok", "agrees with that of a"),
        ({"a": 60.1}, "warning", "it is 1 min ahead of that of a"),
        ({"a": -61.0}, "warning", "1 min behind that of a.*timedatectl"),
        ({"a": 7200.0}, "warning", "2 h 0 min ahead"),
        ({"a": -7200.0, "b": 1.0}, "ok", "that of b"),
        ({}, "skipped", "no server answered"),
    ],
)
def test_a_clock_that_is_a_minute_off_is_a_warning(
    ahead: dict[str, float], result: str, message: str
):
    finding = doctor_network.clock(ahead, time.time())
    assert finding.result == result and re.search(message, finding.message)


def test_a_fast_clock_is_a_warning(patient: Patient):
    patient.sign_in()
    report = patient.examine(now=lambda: time.time() + 3600)
    report.shows("clock", "warning", r"^it is (59 min|1 h 0 min) ahead of that of 127.0.0.1:\d+")


@pytest.mark.parametrize("age, ahead", [({}, 3600), ({"Age": "3600"}, 0), ({"Age": "1e3"}, 3600)])
def test_the_age_of_a_cached_response_counts_for_the_clock(age: dict[str, str], ahead: float):
    with ScriptedServer(
        answer(200, {}, Date=email.utils.formatdate(time.time() - 3600, usegmt=True), **age)
    ) as server:
        web = doctor_network.ClockSession(settings(), time.time)
        web.get(server.url)
    assert [round(seconds / 10) * 10 for seconds in web.ahead.values()] == [ahead]


@pytest.mark.parametrize("date", [{}, {"Date": "yesterday"}])
def test_a_response_without_a_date_does_not_set_the_clock(date: dict[str, str]):
    with ScriptedServer(answer(200, {}, **date)) as server:
        web = doctor_network.ClockSession(settings(), time.time)
        web.get(server.url)
    assert web.ahead == {}


# file descriptors


@pytest.mark.parametrize(
    "limit, result, message",
    [
        (2080, "ok", "^enough for 1000 client connections$"),
        (resource.RLIM_INFINITY, "ok", "enough"),
        (2079, "warning", "has room for 999 client connections, not 1000; raise it"),
        (1023, "warning", "room for 471 .*; supervisord needs 1024; raise it"),
    ],
)
def test_a_low_limit_of_file_descriptors_is_reported(limit: int, result: str, message: str):
    finding = doctor_files.descriptors(1000, limit)
    assert finding.result == result and re.search(message, finding.message), finding


def test_the_hard_limit_of_the_command_counts(patient: Patient):
    patient.process(["prlimit", "--nofile=80:99"]).shows(
        "file descriptors", "warning", "limit of 99 has room for 9 "
    )
    patient.process(["prlimit", "--nofile=80:100"]).shows(
        "file descriptors", "ok", "enough for 10 "
    )


# client keys

KEY = "laptop " + "0" * 64 + "\n"


@pytest.mark.parametrize(
    "content, environ, result, message",
    [
        (None, {}, "ok", "^no client key required: every program"),
        (None, {"BIND": "::1"}, "ok", "^no client key required: every program"),
        (
            None,
            {"BIND": "192.0.2.1"},
            "failure",
            r"start on 192.0.2.1; `\S*bin/xai-client-key add NAME`, or set XAI_P",
        ),
        (
            None,
            {"BIND": "192.0.2.1", "ALLOW_ANONYMOUS": "1"},
            "warning",
            "^no client key required: whatever can connect to 192.0.2.1 can",
        ),
        (
            None,
            {"CLIENT_KEYS_FILE": "/none/keys"},
            "failure",
            "/none/keys does not exist, so no caller is admitted",
        ),
        (KEY, {}, "ok", r"^required for every call; .*/client-keys holds 1$"),
        (KEY, {"BIND": "192.0.2.1"}, "ok", "holds 1$"),
        ("# none\n", {}, "failure", "holds no key, so no caller is admitted"),
        (
            "hush hush\n",
            {},
            "failure",
            r"cannot be used \(line 1 is not a name and the SHA-256 of a key\), "
            "so no caller is admitted",
        ),
    ],
)
def test_the_state_of_the_client_keys_is_reported(
    patient: Patient, content: str | None, environ: dict[str, str], result: str, message: str
):
    patient.sign_in()
    if content is not None:
        (patient.folder / "client-keys").write_text(content)
    finding = doctor_files.keys(
        settings(**patient.environ | {f"XAI_PROXY_{name}": text for name, text in environ.items()})
    )
    assert finding.result == result and re.search(message, finding.message), finding
    assert (
        finding.exit_code == (78 if result == "failure" else 0)
        and "hush hush" not in finding.message
    )


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)],
    ids=["fifo", "folder", "dangling link"],
)
def test_client_keys_that_are_no_file_are_a_failure(
    patient: Patient, make: Callable[[Path], object]
):
    patient.sign_in()
    make(patient.folder / "client-keys")
    patient.examine().shows(
        "client keys", "failure", r"cannot be used \(it is (not a file|a link to nothing)\)", 78
    )


# the proxy


@pytest.mark.parametrize(
    "bind, url",
    [
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", r"http://\[::1\]:1"),
        ("127.0.0.2", "http://127.0.0.2:1"),
    ],
)
def test_a_stopped_proxy_is_a_warning(bind: str, url: str):
    finding = doctor_network.proxy(settings(XAI_PROXY_BIND=bind, XAI_PROXY_PORT="1"), SIGNED_IN)
    assert finding.result == "warning"
    assert re.search(
        f"^not running: nothing is listening on {url}; start `.*bin/xai-serve`, "
        r"or `\S*bin/xai-proxy` alone$",
        finding.message,
    )


def test_a_proxy_with_other_settings_is_a_failure(patient: Patient, tmp_path: Path):
    patient.sign_in()
    with ProxyProcess(tmp_path) as other:
        patient.examine(PORT=str(other.port)).shows(
            "proxy", "failure", "not ready: .*run with other settings than", 75
        )


@pytest.mark.parametrize("signed_in", [False, True])
def test_a_ready_proxy_with_another_login_is_a_warning(
    patient: Patient, tmp_path: Path, signed_in: bool
):
    if signed_in:
        patient.sign_in(expires_at=int(time.time()) + 1000)
    with ProxyProcess(tmp_path) as other:
        other.sign_in()
        patient.examine(PORT=str(other.port)).shows(
            "proxy", "warning", "and ready: no refresher; .*; it seems to run with other settings"
        )


def test_a_proxy_on_port_0_is_not_checked(patient: Patient):
    patient.examine(PORT="0").shows("proxy", "skipped", "XAI_PROXY_PORT is 0")


def test_a_proxy_that_is_not_ready_is_a_failure(tmp_path: Path):
    with ProxyProcess(tmp_path) as running:
        where = settings(XAI_PROXY_PORT=str(running.port))
        for verdict, message in (
            (NO_LOGIN, r"\(missing\); run `xai-login --device` to sign in, or see the log$"),
            (SIGNED_IN, r"\(missing\).*; it seems to run with other settings than these$"),
        ):
            finding = doctor_network.proxy(where, verdict)
            assert (finding.result, finding.exit_code) == ("failure", 75)
            assert re.search(
                f"/v1, but not ready: no login that can be used {message}", finding.message
            )
        running.sign_in()
        where = settings(
            XAI_PROXY_PORT=str(running.port),
            HTTPS_PROXY=CLOSED,
            XAI_PROXY_ISSUER=ISSUER,
            XAI_PROXY_TOKEN_PATH=str(running.token_path),
        )
        verdict = judgement.of(TokenStore(where), time.time())
        finding = doctor_network.proxy(where, verdict)
        assert finding.result == "ok" and f"ready: {verdict.reason}" in finding.message


@pytest.mark.parametrize(
    "reply",
    [
        answer(404, "Not found", "text/plain"),
        answer(200, "ok", "text/plain"),
        answer(200, {"status": "up"}),
    ],
)
def test_another_program_on_the_port_is_a_failure(patient: Patient, reply: bytes):
    with ScriptedServer(reply) as other:
        patient.examine(PORT=str(other.port)).shows(
            "proxy",
            "failure",
            f"another program listens on {other.url}; stop that, or set XAI_PROXY_PORT",
            78,
        )


def test_a_silent_program_on_the_port_times_out():
    with ScriptedServer(lambda connection: connection.recv(65536) and connection.recv(1)) as silent:
        begun = time.monotonic()
        finding = doctor_network.proxy(settings(XAI_PROXY_PORT=str(silent.port)), SIGNED_IN)
        assert local_proxy.DEADLINE <= time.monotonic() - begun < local_proxy.DEADLINE + 2
    assert (finding.result, finding.exit_code) == ("failure", 69)
    assert finding.message.startswith(f"{silent.url} does not answer as the proxy does (")
    assert "sent no complete response within 3 s" in finding.message

"""xai-login --status: what it shows of each state, on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from checkout import ROOT
from login_command import ACCOUNT, Login
from proxy_process import ProxyProcess
from sandbox import Sandbox
from scripted_server import ScriptedServer, answer

from xaiproxy import config, refresher_status, token_store, tokens

DATE = r"20[\d-]{8} \d\d:\d\d UTC"
SERVE = f"`{ROOT}/bin/xai-serve`"
SIGN_IN = f"run `{ROOT}/bin/xai-login --device` to sign in"
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def beat(login: Login, age: float = 0) -> None:
    """Write a heartbeat of the refresher, so many seconds old."""
    lock = login.path.with_name("tokens.json.lock")
    lock.touch()
    at = time.time() - age
    os.utime(lock, (at, at))


def matches(lines: list[str], patterns: list[str]) -> None:
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns):
        assert re.fullmatch(pattern, line), (pattern, line)


@pytest.fixture
def served(login: Login, endpoint: ProxyProcess) -> Login:
    """A login that a running proxy serves."""
    login.path = endpoint.token_path
    login.env |= {"XAI_PROXY_TOKEN_PATH": str(login.path), "XAI_PROXY_PORT": str(endpoint.port)}
    login.sandbox.write_login(login.path, account=ACCOUNT)
    login.sandbox.reset()
    return login


def test_a_good_login_that_is_served(served: Login, sandbox: Sandbox):
    beat(served)
    before = served.files(), served.path.read_bytes()
    result = served.run("--status")
    assert (result.returncode, result.stderr) == (0, "")
    url = f"http://127.0.0.1:{served.env['XAI_PROXY_PORT']}/v1"
    matches(
        result.stdout.splitlines(),
        [
            f"Serving {url}",
            f"Account     {ACCOUNT} at {sandbox.url}",
            f"Token       valid until {DATE}, for another 5 h 59 min",
            f"            obtained at {DATE}, next renewal at {DATE}",
            r"Refresher   running, last heartbeat \d s ago",
            f"Proxy       serving {url}",
            f"Token file  {served.path}",
        ],
    )
    # A fifth of the lifetime of 6 h is left at the next renewal.
    times = re.findall(r"(\d\d):(\d\d) UTC", result.stdout)
    end, begin, due = (int(hour) * 60 + int(minute) for hour, minute in times)
    assert ((end - due) % 1440, (end - begin) % 1440) == (72, 360)
    assert (served.files(), served.path.read_bytes()) == before and sandbox.requests() == []


def test_what_is_published_is_shown(login: Login, sandbox: Sandbox):
    tokens_json = sandbox.write_login(login.path)
    beat(login)
    store = token_store.TokenStore(
        config.from_environ({"XAI_PROXY_TOKEN_PATH": str(login.path)}, dotenv_path=os.devnull)
    )
    mark = tokens.fingerprint(tokens_json["access_token"])
    now = time.time()

    def published(**members: Any) -> str:
        refresher_status.write(store, refresher_status.Status(now, login=mark, **members))
        result = login.run("--status", XAI_PROXY_PUBLISH="file:/copy/login.json")
        return re.findall(r"^Published +(.*)", result.stdout, re.MULTILINE)[0]

    assert published() == "not yet"
    assert re.fullmatch(f"at {DATE}", published(published_at=now))
    failing = published(published_at=now, publish_failure="/copy cannot be written")
    assert re.fullmatch(f"at {DATE}; since then: /copy cannot be written", failing)
    assert published(publish_failure="it is locked") == "not yet: it is locked"
    login.path.with_name("tokens.json.status").unlink()
    result = login.run("--status", XAI_PROXY_PUBLISH="file:/copy/login.json")
    assert "\nPublished   unknown: " in result.stdout
    assert "Published" not in login.run("--status").stdout


def test_without_a_proxy_and_a_refresher_both_are_to_be_started(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path)
    result = login.run("--status")
    assert (result.returncode, result.stderr) == (0, "")
    headline, account, *_, refresher, heartbeat, proxy, _path = result.stdout.splitlines()
    assert headline == f"Not serving: neither the proxy nor the refresher is running; start {SERVE}"
    assert account == f"Account     an unnamed account at {sandbox.url}"
    assert re.fullmatch(f"Refresher   not running: the login lapses at {DATE}", refresher)
    assert heartbeat == "            no heartbeat so far"
    assert proxy == (
        "Proxy       not running: nothing is listening on http://127.0.0.1:1; start " + SERVE
    )
    beat(login)
    headline = login.run("--status").stdout.splitlines()[0]
    assert headline == f"Not serving: no proxy is running; start {SERVE}"
    beat(login, 90)
    assert re.search(f"\n +last heartbeat at {DATE}\n", login.run("--status").stdout)


def test_a_proxy_without_a_refresher_serves_until_the_login_lapses(served: Login):
    beat(served, 90)
    headline = served.run("--status").stdout.splitlines()[0]
    assert re.fullmatch(
        r"Serving http://127.0.0.1:\d+/v1: no refresher; the login lapses at 20[0-9-]{8} [0-9:]{5} UTC; "
        + re.escape(f"start {SERVE}"),
        headline,
    )


@pytest.mark.parametrize(
    "signed_in, headline",
    [
        (False, "Not signed in: .* does not exist; .*"),
        (True, "Signed in; the proxy at {} seems to run with other settings than these"),
    ],
)
def test_a_proxy_of_another_login_is_named(served: Login, tmp_path, signed_in: bool, headline: str):
    served.path = tmp_path / "elsewhere" / "tokens.json"
    served.env["XAI_PROXY_TOKEN_PATH"] = str(served.path)
    if signed_in:
        served.sandbox.write_login(served.path)
        beat(served)
    first, *_, proxy, _path = served.run("--status").stdout.splitlines()
    url = f"http://127.0.0.1:{served.env['XAI_PROXY_PORT']}"
    assert re.fullmatch(headline.format(url), first), first
    assert (
        proxy == f"Proxy       serving {url}/v1, but it seems to run with other settings than these"
    )


def test_a_proxy_that_is_not_ready_has_its_own_reason(login: Login, sandbox: Sandbox, tmp_path):
    sandbox.write_login(login.path)
    beat(login)
    with ProxyProcess(tmp_path) as other:
        result = login.run("--status", XAI_PROXY_PORT=str(other.port))
        assert result.returncode == 0
        assert result.stdout.startswith(
            f"Not serving: the proxy at http://127.0.0.1:{other.port} is not ready: "
            "no login that can be used (missing); "
        )
        login.path.unlink()
        # The headline has the same reason.
        assert f"Proxy       running at http://127.0.0.1:{other.port}, but not ready\n" in (
            login.run("--status", XAI_PROXY_PORT=str(other.port)).stdout
        )


@pytest.mark.parametrize(
    "reply, kind, line",
    [
        (answer(200, {"status": "up"}), "other", "not running: another program listens on {url}"),
        (
            lambda connection: connection.recv(65536) and connection.close(),
            "silent",
            "does not answer at {url}: 127.0.0.1:{port} closed the connection before its response "
            "was complete; try again",
        ),
    ],
)
def test_another_program_at_the_proxys_address(
    login: Login, sandbox: Sandbox, reply: Any, kind: str, line: str
):
    sandbox.write_login(login.path)
    beat(login)
    with ScriptedServer(reply) as other:
        port = str(other.port)
        result = login.run("--status", XAI_PROXY_PORT=port)
        assert result.returncode == 0
        assert result.stdout.startswith(f"Not serving: no proxy answers at {other.url}\n")
        assert f"Proxy       {line.format(url=other.url, port=port)}\n" in result.stdout
        proxy = json.loads(login.run("--status", "--json", XAI_PROXY_PORT=port).stdout)["proxy"]
        assert (proxy["url"], proxy["kind"], proxy["ready"]) == (other.url, kind, False)


def test_a_proxy_on_any_free_port_is_not_asked(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path)
    beat(login)
    result = login.run("--status", XAI_PROXY_PORT="0")
    assert result.returncode == 0 and result.stdout.startswith("Signed in\n")
    assert "Proxy       not asked: XAI_PROXY_PORT is 0" in result.stdout


def test_a_refresher_on_another_machine_is_named(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path, refresh_token=None)
    url = "http://xaiproxy-refresher:9092"
    result = login.run("--status", XAI_PROXY_PORT="0", XAI_PROXY_REFRESHER=url)
    assert result.returncode == 0 and result.stdout.startswith("Signed in\n")
    assert f"Refresher   on another machine: {url} is asked when the API refuses" in result.stdout
    assert "lapses" not in result.stdout and "no refresh token" not in result.stdout


def test_status_does_not_wait_for_the_lock(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path)
    with open(f"{login.path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert login.run("--status").returncode == 0


@pytest.mark.parametrize(
    "members, code, message",
    [
        (
            {"expires_at": 1000},
            75,
            [
                "Not serving: the access token expired at 1970-01-01 00:16 UTC and has not been renewed "
                f"yet: no refresher runs; start {SERVE}",
                "Token       expired at 1970-01-01 00:16 UTC, ",
                "Refresher   not running: the login lapsed at 1970-01-01 00:16 UTC",
            ],
        ),
        (
            {"expires_at": 1000, "refresh_token": None},
            77,
            [
                "Not serving: the access token expired at 1970-01-01 00:16 UTC, and the token file "
                f"holds no refresh token; {SIGN_IN}, or replace the file\n",
                "Refresher   not needed: the token file holds no refresh token",
            ],
        ),
        (
            {
                "refresh_error": {
                    "code": "503",
                    "description": "auth.x.ai answered HTTP 503",
                    "at": 2000,
                    "retry_at": 2060,
                }
            },
            0,
            [
                "The last refresh failed at 1970-01-01 00:33 UTC: auth.x.ai answered HTTP 503.",
                "The next try is due at 1970-01-01 00:34",
            ],
        ),
        (
            {
                "refresh_error": {
                    "code": "invalid_grant",
                    "description": "revoked\x1b[2J",
                    "at": 2000,
                    "terminal": True,
                }
            },
            77,
            [
                "but the login has ended (invalid_grant); " + SIGN_IN,
                "failed at 1970-01-01 00:33 UTC: revoked [2J.",
            ],
        ),
    ],
)
def test_a_failing_login_names_the_reason(
    login: Login, sandbox: Sandbox, members: dict[str, Any], code: int, message: list[str]
):
    sandbox.write_login(login.path, **members)
    result = login.run("--status")
    assert (result.returncode, result.stderr) == (code, "")
    for sentence in message:
        assert sentence in result.stdout


def test_a_token_that_the_api_refuses_is_not_called_valid(login: Login, sandbox: Sandbox):
    written = sandbox.write_login(login.path)
    store = token_store.TokenStore(config.from_environ(login.env))
    store.ask_refresh(written["access_token"])
    result = login.run("--status")
    assert result.returncode == 75 and "valid" not in result.stdout
    assert result.stdout.startswith("Not serving: the API refuses the access token")
    assert "Token       refused by the API, though it would expire only at 20" in result.stdout


def test_without_a_login_the_headline_advises_to_sign_in(login: Login):
    result = login.run("--status")
    assert (result.returncode, result.stderr) == (77, "")
    headline, proxy, path = result.stdout.splitlines()
    assert headline == f"Not signed in: {login.path} does not exist; {SIGN_IN}"
    assert proxy.startswith("Proxy       not running: ") and path.endswith(str(login.path))
    assert not login.path.parent.exists()


def test_status_of_an_unreadable_file_names_the_error(login: Login, sandbox: Sandbox):
    """This does not advise a new sign-in."""
    sandbox.write_login(login.path)
    login.path.unlink()
    # A read of its beginning fails with EIO.
    login.path.symlink_to("/proc/self/mem")
    result = login.run("--status")
    assert (result.returncode, result.stderr) == (75, "")
    assert (
        "cannot be read at the moment (Input/output error)" in result.stdout
        and "sign in" not in result.stdout
    )


# --json


def test_status_is_one_json_object(login: Login, sandbox: Sandbox):
    written = sandbox.write_login(login.path, account=ACCOUNT)
    event = json.loads(login.run("--status", "--json").stdout)
    assert re.fullmatch(
        r"no refresher; the login lapses at 20[0-9-]{8} [0-9:]{5} UTC", event["reason"]
    )
    assert event == {
        "event": "status",
        "usable": True,
        "state": "fresh",
        "account": ACCOUNT,
        "issuer": sandbox.url,
        "verdict": "no_refresher",
        "reason": event["reason"],
        "message": f"not serving: neither the proxy nor the refresher is running; start {SERVE}",
        "refresh_error": None,
        "obtained_at": written["obtained_at"],
        "expires_at": written["expires_at"],
        "next_refresh_at": None,
        "token_path": str(login.path),
        "refresher_alive": False,
        "refresher_seen_at": None,
        "refresher": None,
        "proxy": {
            "url": "http://127.0.0.1:1",
            "kind": "nothing",
            "ready": False,
            "reason": "",
            "warning": "",
        },
        "quota": None,
        "quota_error": None,
    }
    beat(login)
    members = set(event)
    event = json.loads(login.run("--status", "--json").stdout)
    assert event["next_refresh_at"] == written["expires_at"] - 21600 / 5
    assert abs(event["refresher_seen_at"] - time.time()) < 30 and set(event) == members


@pytest.mark.parametrize(
    "content, state",
    [("{half", "corrupt"), ('{"access_token": "at", "expires_at": 9e9}', "foreign")],
)
def test_a_file_without_a_login_is_a_json_object_with_the_same_members(
    login: Login, sandbox: Sandbox, content: str, state: str
):
    sandbox.write_login(login.path)
    members = set(json.loads(login.run("--status", "--json").stdout))
    login.path.write_text(content)
    result = login.run("--status", "--json")
    event = json.loads(result.stdout)
    assert (result.returncode, event["usable"], event["state"]) == (77, False, state)
    assert str(login.path) in event["message"] and set(event) == members


# on a terminal


@contextlib.contextmanager
def shown(login: Login, *arguments: str, columns: int = 100, **environ: str) -> Iterator[list[str]]:
    """The lines of --status on a terminal."""
    with login.terminal("--status", *arguments, columns=columns, **environ) as terminal:
        terminal.end()
        yield terminal.screen.replace("\r\n", "\n").splitlines()


def bars(lines: list[str]) -> list[str]:
    return [
        found[0] for line in lines if (found := re.search("[█░┃#|-]{10,}", ESCAPE.sub("", line)))
    ]


def test_a_terminal_gets_colours_and_a_bar(login: Login, sandbox: Sandbox):
    sandbox.write_login(
        login.path, obtained_at=int(time.time()) - 9000, expires_at=int(time.time()) + 9000
    )
    beat(login)
    with shown(login) as lines:
        assert lines[0].startswith("\x1b[33mNot serving: no proxy is running")
        # Half of the lifetime has passed, and four fifths have at the next renewal.
        assert bars(lines) == ["█" * 20 + "░" * 12 + "┃" + "░" * 7]
    plain = login.run("--status").stdout.splitlines()
    assert "\x1b" not in "".join(plain) and bars(plain) == []


@pytest.mark.parametrize(
    "members, colour",
    [
        ({}, "33"),
        ({"expires_at": 1000}, "31"),
        (
            {
                "refresh_error": {
                    "code": "invalid_grant",
                    "description": "",
                    "at": 1,
                    "terminal": True,
                }
            },
            "31",
        ),
    ],
)
def test_the_headline_has_the_colour_of_the_state(
    login: Login, sandbox: Sandbox, members: dict[str, Any], colour: str
):
    sandbox.write_login(login.path, **members)
    with shown(login) as lines:
        assert lines[0].startswith(f"\x1b[{colour}m")


def test_a_served_login_is_green(served: Login):
    beat(served)
    with shown(served) as lines:
        assert lines[0].startswith("\x1b[32mServing http://")


@pytest.mark.parametrize(
    "environ, drawn",
    [
        ({"NO_COLOR": "1"}, "█"),
        ({"NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}, "#"),
        ({"TERM": "dumb"}, ""),
    ],
)
def test_plain_text_where_escape_sequences_are_not_wanted(
    login: Login, sandbox: Sandbox, environ: dict[str, str], drawn: str
):
    sandbox.write_login(
        login.path, obtained_at=int(time.time()) - 9000, expires_at=int(time.time()) + 9000
    )
    with shown(login, **environ) as lines:
        assert "\x1b" not in "".join(lines)
        assert [bar[0] for bar in bars(lines)] == list(drawn)


def test_a_narrow_terminal_gets_lines_that_fit(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path, account=ACCOUNT)
    beat(login)
    with shown(login, columns=40, NO_COLOR="1") as lines:
        # A command and a path can be copied as one line.
        whole = [line for line in lines if "`" in line or str(login.path) in line]
        assert len(whole) == 3
        assert all(len(line) < 40 for line in lines if line not in whole)


def test_no_control_character_of_a_file_reaches_the_terminal(login: Login, sandbox: Sandbox):
    login.path = login.path.with_name("you\x1b]0;title\x07\x9b2J.json")
    sandbox.write_login(login.path)
    result = login.run("--status", XAI_PROXY_TOKEN_PATH=str(login.path))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.stdout)
    assert re.search("Token file  .*you ]0;title.*2J.json\n$", result.stdout)

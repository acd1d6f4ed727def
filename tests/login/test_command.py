"""xai-login as a program: on a terminal, in a pipe, and with every fault that can stop it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segno
from checkout import ROOT
from login_command import ACCOUNT, COMMAND, Login
from sandbox import Sandbox
from scripted_server import ScriptedServer
from terminal import CTRL_C, Terminal

QUICK = {"device_interval": 0.05, "auto_approve": 0}


def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def fails(result: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    """Assert that stderr is one clear sentence, and stdout empty."""
    assert (result.returncode, result.stdout) == (code, "")
    *talk, sentence = result.stderr.splitlines()
    assert sentence.startswith("xai-login: ") and re.search(message, sentence), result.stderr
    assert not any("Traceback" in line for line in talk)


# by device


def test_device_login_on_a_terminal(login: Login, sandbox: Sandbox):
    sandbox.set(device_interval=1.2)
    with login.terminal("--device") as terminal:
        code = terminal.expect(r"    ([A-Z0-9]{4}-[A-Z0-9]{4})\r\n")[1]
        terminal.expect(
            f"\r\x1b\\[K15:00 left to approve {code}\r\x1b\\[K14:59 left to approve {code}"
        )
        sandbox.approve(code)
        assert terminal.end() == 0
        screen = terminal.screen
    url = f"{sandbox.url}/oauth2/device?user_code={code}"
    # The rows of a terminal of 80x24.
    last_rows = screen.partition("\r\x1b[K")[0].split("\r\n")[-24:]
    assert {f"    {sandbox.url}/oauth2/device", f"    {url}", f"    {code}"} <= set(last_rows)
    code = segno.make(url, micro=False, error="l", boost_error=False)
    assert qr_code(screen) == [[module > 0 for module in row] for row in code.matrix_iter(border=2)]
    assert (
        f"\r\x1b[KSigned in as {ACCOUNT} at {sandbox.url}; the login is in {login.path}.\r\n"
        in screen
    )
    # As at the top of the README, with no warning that no refresher runs: it cannot run yet.
    readme = (ROOT / "README.md").read_text()
    shown = re.sub(
        r"20[\d-]{8} \d\d:\d\d UTC", "2026-11-23 14:05 CET", screen.rpartition("\x1b[K")[2]
    )
    for ours, shown_as in (
        (ACCOUNT, "you@example.org"),
        (sandbox.url, "https://auth.x.ai"),
        (str(login.path), "/home/you/.xai-proxy/tokens.json"),
        (f"{ROOT}/", ""),
    ):
        shown = shown.replace(ours, shown_as)
    assert "\n" + shown.replace("\r\n", "\n") in readme and "Next: serve it" in shown
    saved = login.saved()
    assert (saved["account"], saved["issuer"], saved["token_endpoint"]) == (
        ACCOUNT,
        sandbox.url,
        f"{sandbox.url}/oauth2/token",
    )
    assert (
        login.path.stat().st_mode & 0o777 == 0o600
        and login.path.parent.stat().st_mode & 0o777 == 0o700
    )
    assert login.files() == ["tokens.json", "tokens.json.lock"]
    login.holds_no_secret(screen)


def qr_code(screen: str) -> list[list[bool]]:
    """The dark modules of the half-block picture on the screen."""
    rows: list[list[bool]] = []
    for line in re.findall(r"\x1b\[38;5;231;48;5;16m(.*)\x1b\[0m", screen):
        rows.append([block in " ▄" for block in line])
        rows.append([block in " ▀" for block in line])
    # With an odd number of rows, half of the last line is empty.
    return rows[: len(rows[0])]


def test_a_narrow_terminal_gets_no_qr_code_and_no_line_that_wraps_each_second(
    login: Login, sandbox: Sandbox
):
    sandbox.set(**QUICK)
    with login.terminal("--device", columns=30) as terminal:
        assert terminal.end() == 0
        assert "48;5;16" not in terminal.screen and "█" not in terminal.screen
    updates = terminal.screen.split("\r\x1b[K")[1:-1]
    assert updates and all(
        re.fullmatch(r"15:00 left to approve [A-Z0-9-]{7}", update) for update in updates
    )


@pytest.mark.parametrize("value, coloured", [("1", False), ("", True)])
def test_no_color_is_respected_when_it_is_not_empty(
    login: Login, sandbox: Sandbox, value: str, coloured: bool
):
    sandbox.set(**QUICK)
    with login.terminal("--device", NO_COLOR=value) as terminal:
        assert terminal.end() == 0
        # The summary has colours, too.
        assert bool(re.search(r"\x1b\[[\d;]+m", terminal.screen)) == coloured
        assert "█" in terminal.screen and "Signed in as" in terminal.screen


def test_a_dumb_terminal_gets_no_escape_sequence(login: Login, sandbox: Sandbox):
    sandbox.set(**QUICK)
    with login.terminal("--device", TERM="dumb") as terminal:
        assert terminal.end() == 0
        assert "\x1b" not in terminal.screen and "Signed in as" in terminal.screen


def test_an_address_too_long_for_a_qr_code_is_printed(login: Login, sandbox: Sandbox):
    url = f"{sandbox.url}/oauth2/device?user_code=4XWJ-JJAZ&{'x' * 3000}"
    page = {
        "device_code": "0f0f",
        "user_code": "4XWJ-JJAZ",
        "verification_uri": url[:40],
        "verification_uri_complete": url,
    }
    sandbox.set(
        answers=[
            {"path": "/oauth2/device/code", "body": page | {"expires_in": 900}},
            {"path": "/oauth2/token", "body": {"access_token": "at", "expires_in": 60}},
        ]
    )
    with login.terminal("--device", columns=200) as terminal:
        terminal.expect("left to approve")
        assert (
            "█" not in terminal.screen
            and "QR code" not in terminal.screen
            and "Traceback" not in terminal.screen
        )
        terminal.type(CTRL_C)
        assert terminal.end() == 130


def test_device_login_in_a_pipe(login: Login, sandbox: Sandbox):
    sandbox.set(**QUICK)
    # There is no display, so no browser: the default is --device.
    result = login.run()
    assert result.returncode == 0
    assert (
        result.stdout == f"Signed in as {ACCOUNT} at {sandbox.url}; the login is in {login.path}.\n"
    )
    assert (
        "enter the code" in result.stderr
        and "\x1b" not in result.stderr
        and "█" not in result.stderr
    )
    login.holds_no_secret(result.stdout, result.stderr)


def test_device_login_prints_json_events(login: Login, sandbox: Sandbox):
    sandbox.set(
        device_interval=0.05,
        answers=[
            {"path": "/oauth2/token", "error": "bad_gateway", "times": 1},
            {"path": "/oauth2/token", "cut": "close", "times": 1},
        ],
    )
    with login.start("--device", "--json") as process:
        device = json.loads(process.stdout.readline())
        first, second = json.loads(process.stdout.readline()), json.loads(process.stdout.readline())
        sandbox.approve(device["user_code"])
        rest, stderr = process.communicate(timeout=10)
    page = f"{sandbox.url}/oauth2/device"
    assert device == {
        "event": "user_code",
        "user_code": device["user_code"],
        "verification_uri": page,
        "interval": 1,
        "verification_uri_complete": f"{page}?user_code={device['user_code']}",
        "expires_in": 900,
    }
    assert first["event"] == second["event"] == "trouble" and "HTTP 502" in first["message"]
    done = json.loads(rest)
    assert done == {
        "event": "done",
        "account": ACCOUNT,
        "issuer": sandbox.url,
        "token_path": str(login.path),
        "expires_at": login.saved()["expires_at"],
        "refresher_alive": False,
    }
    assert (process.returncode, stderr) == (0, "")
    login.holds_no_secret(rest)


@pytest.mark.parametrize(
    "knobs, code, message",
    [
        ({"device_lifetime": 1}, 77, "the code expired before it was approved; start again"),
        (
            {"answers": [{"path": "/oauth2/token", "error": "access_denied"}]},
            77,
            r"ended the login \(access_denied: The user rejected the request\); start",
        ),
        (
            {"answers": [{"path": "/oauth2/token", "error": "expired_token"}]},
            77,
            "the code expired",
        ),
        (
            {"answers": [{"path": "/oauth2/token", "error": "tier_denied"}]},
            77,
            "Your subscription does not include API access",
        ),
        (
            {"answers": [{"path": "/oauth2/device/code", "error": "cloudflare_challenge"}]},
            69,
            "an HTML page",
        ),
        (
            {"answers": [{"path": "/.well-known/*", "status": 404}]},
            69,
            "returned no discovery document.*check XAI_PROXY_ISSUER",
        ),
        (
            {"answers": [{"path": "/.well-known/*", "body": {"issuer": "https://auth.x.ai"}}]},
            69,
            "correct XAI_PROXY_ISSUER",
        ),
    ],
)
def test_a_refused_login_is_one_sentence_and_an_exit_code(
    login: Login, sandbox: Sandbox, knobs: dict[str, Any], code: int, message: str
):
    sandbox.set(device_interval=0.05, **knobs)
    result = login.run("--device")
    fails(result, code, message)
    assert login.files() == ["tokens.json.lock"]
    assert "—" not in result.stderr


def test_an_unreachable_issuer_is_one_sentence(login: Login):
    fails(
        login.run("--device", XAI_PROXY_ISSUER="http://127.0.0.1:1"),
        69,
        r"127\.0\.0\.1:1 cannot be reached \(Connection ref",
    )


def test_a_failure_is_a_json_event(login: Login):
    result = login.run("--device", "--json", XAI_PROXY_ISSUER="http://127.0.0.1:1")
    error = json.loads(result.stdout)
    assert error.pop("message").startswith("127.0.0.1:1 cannot be reached")
    assert (error, result.returncode) == ({"event": "error", "exit_code": 69}, 69)


@pytest.mark.parametrize(
    "arguments, environ, code, message",
    [
        (("--device", "--status"), {}, 64, "not allowed with"),
        (("--devize",), {}, 64, "unrecognized"),
        (("--watch",), {}, 64, "--watch and --quota go with --status"),
        (("--device", "--quota"), {}, 64, "--watch and --quota go with --status"),
        (("--doctor", "--watch", "--json"), {}, 64, "--watch and --quota go with --status"),
        (
            (),
            {"XAI_PROXY_ISUER": "x"},
            78,
            "XAI_PROXY_ISUER is not a setting; did you mean XAI_PROXY_ISSUER?",
        ),
        (("--status",), {"XAI_PROXY_ISSUER": "http://192.0.2.1"}, 78, "XAI_PROXY_ISSUER"),
    ],
)
def test_a_wrong_option_or_setting_is_one_sentence(
    login: Login, arguments: tuple[str], environ: dict[str, str], code: int, message: str
):
    fails(login.run(*arguments, **environ), code, re.escape(message))
    assert not login.path.parent.exists()


# an existing file


def test_a_sign_in_replaces_an_existing_login(login: Login, sandbox: Sandbox):
    sandbox.set(**QUICK)
    former = sandbox.write_login(login.path, account="former@example.invalid")
    result = login.run("--device")
    assert result.returncode == 0
    assert f"replaces the one of former@example.invalid in {login.path}" in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "The login that was replaced stays valid at the issuer. To have one revoked, run "
        f"`{ROOT}/bin/xai-login --logout` "
        "before you sign in again."
    )
    sandbox.write_login(
        login.path, refresh_error={"code": "invalid_grant", "at": 1, "terminal": True}
    )
    assert "stays valid" not in login.run("--device").stderr
    assert (
        login.saved()["account"] == ACCOUNT
        and login.saved()["refresh_token"] != former["refresh_token"]
    )


def test_scopes_that_were_not_granted_are_named(login: Login, sandbox: Sandbox):
    granted = {
        "access_token": "at",
        "refresh_token": "rt",
        "expires_in": 60,
        "scope": "openid api:access extra",
    }
    sandbox.set(**QUICK, answers=[{"path": "/oauth2/token", "body": granted}])
    message = (
        "the scope offline_access profile was not granted; requests that need it will be refused"
    )
    environ = {"XAI_PROXY_SCOPE": "openid offline_access api:access profile"}
    assert f"Note: {message}.\n" in login.run("--device", **environ).stderr
    events = [
        json.loads(line) for line in login.run("--device", "--json", **environ).stdout.splitlines()
    ]
    assert {"event": "trouble", "message": message} in events and events[-1]["event"] == "trouble"


@pytest.mark.parametrize(
    "members", [{"issuer": "https://auth.x.ai"}, {"client_id": "another"}, {"issuer": None}]
)
def test_a_login_of_another_issuer_is_not_replaced(
    login: Login, sandbox: Sandbox, members: dict[str, Any]
):
    sandbox.write_login(login.path, **members)
    sandbox.reset()
    before = login.path.read_bytes()
    for arguments in (("--device",), ("--logout",)):
        fails(
            login.run(*arguments),
            78,
            "was not changed, since the settings are .*; name another file with --token-path",
        )
    assert login.path.read_bytes() == before
    # No approval was requested.
    assert sandbox.requests() == []


def test_token_path_names_another_file(login: Login, sandbox: Sandbox):
    sandbox.set(**QUICK)
    assert login.run("--device", "--token-path", f"{login.path}2").returncode == 0
    assert login.files() == ["tokens.json2", "tokens.json2.lock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_login_of_another_user_is_not_replaced(login: Login, sandbox: Sandbox):
    """That user's refresher could not read the new file."""
    sandbox.write_login(login.path)
    os.chown(login.path, 12345, 12345)
    sandbox.reset()
    fails(
        login.run("--device"),
        75,
        "belongs to user 12345, and this is user 0 .*. Run the same as user 12345",
    )
    assert (
        sandbox.requests() == []
        and login.path.stat().st_uid == 12345
        and login.files() == ["tokens.json"]
    )


def test_a_link_is_replaced_once_the_login_is_approved(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path.with_name("elsewhere"))
    sandbox.set(**QUICK, answers=[{"path": "/oauth2/token", "error": "access_denied", "times": 1}])
    login.path.symlink_to("elsewhere")
    assert login.run("--device").returncode == 77 and login.path.is_symlink()
    assert login.run("--device").returncode == 0 and not login.path.is_symlink()
    assert login.saved()["account"] == ACCOUNT


def test_a_file_that_is_no_login_is_kept_aside(login: Login, sandbox: Sandbox):
    sandbox.set(**QUICK)
    login.path.parent.mkdir()
    login.path.write_text("{half")
    result = login.run("--device")
    assert result.returncode == 0 and "is kept as" in result.stderr
    _login, kept, _lock = login.files()
    assert (
        kept.startswith("tokens.json.corrupt-")
        and (login.path.parent / kept).read_text() == "{half"
    )


def test_a_sign_in_waits_for_the_writer_that_holds_the_lock(login: Login, sandbox: Sandbox):
    sandbox.set(**QUICK)
    sandbox.write_login(login.path)
    with open(f"{login.path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with login.start("--device") as process:
            until(lambda: f"{login.path}.lock" in open_files(process.pid))
            sandbox.reset()
            assert sandbox.requests() == []
            sandbox.set(**QUICK)
            fcntl.flock(lock, fcntl.LOCK_UN)
            process.communicate(timeout=10)
    assert process.returncode == 0


def open_files(pid: int) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(fd))
    return found


# Ctrl-C


def test_ctrl_c_while_polling_leaves_no_file(login: Login):
    with login.terminal("--device") as terminal:
        terminal.expect("left to approve")
        terminal.type(CTRL_C)
        assert terminal.end() == 130
        assert "xai-login: interrupted" in terminal.screen and "Traceback" not in terminal.screen
    assert login.files() == ["tokens.json.lock"]


def test_ctrl_c_ends_a_login_whose_issuer_does_not_respond(login: Login):
    with (
        ScriptedServer(lambda connection: connection.recv(65536) and connection.recv(1)) as silent,
        login.terminal("--device", XAI_PROXY_ISSUER=silent.url) as terminal,
    ):
        until(lambda: silent._threads)
        terminal.type(CTRL_C)
        assert terminal.end(5) == 130


def test_ctrl_c_is_a_json_event(login: Login):
    with login.start("--device", "--json") as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=10)
    assert json.loads(rest) == {"event": "error", "message": "interrupted", "exit_code": 130}
    assert process.returncode == 130


# disks


@pytest.fixture
def mounted(login: Login, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """xai-login in a mount namespace of its own, with its token folder on a small file system."""
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    ).returncode:
        pytest.skip("unshare -rm cannot mount here")
    login.path.parent.mkdir()

    def start(options: str, *arguments: str) -> subprocess.Popen[str]:
        script = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'
        return login.start(
            *arguments,
            prefix=["unshare", "-rm", "sh", "-c", script, "sh", options, str(login.path.parent)],
        )

    return start


@pytest.mark.parametrize(
    "options, message", [("size=32k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_full_or_read_only_disk_fails_before_the_approval(
    mounted, sandbox: Sandbox, options: str, message: str
):
    with mounted(options, "--device") as process:
        _, stderr = process.communicate(timeout=10)
    assert (process.returncode, sandbox.requests()) == (75, [])
    assert message in stderr and stderr.count("\n") == 1


def test_a_disk_that_fills_up_after_the_approval_is_retried(
    mounted, login: Login, sandbox: Sandbox
):
    """The approved login is not lost: xai-login prints the error and retries until there is room."""
    sandbox.set(device_interval=0.05)
    with mounted("size=128k", "--device", "--json") as process:
        device = json.loads(process.stdout.readline())
        folder = Path(f"/proc/{process.pid}/root{login.path.parent}")
        with pytest.raises(OSError):
            (folder / "ballast").write_bytes(b"x" * 1_000_000)
        sandbox.approve(device["user_code"])
        trouble = json.loads(process.stdout.readline())
        assert trouble["event"] == "trouble" and "No space left on device" in trouble["message"]
        assert not (folder / "tokens.json").exists()
        (folder / "ballast").unlink()
        done = json.loads(process.stdout.readline())
        assert done["event"] == "done" and process.wait(10) == 0
        process.stdout.close(), process.stderr.close()
    assert sandbox.counters()["logins"] == 1


def test_a_login_is_saved_though_stdout_is_closed(login: Login, sandbox: Sandbox):
    sandbox.set(device_interval=0.05)
    with login.start("--device", "--json") as process:
        device = json.loads(process.stdout.readline())
        process.stdout.close()
        sandbox.set(
            device_interval=0.05,
            answers=[{"path": "/oauth2/token", "error": "bad_gateway", "times": 1}],
        )
        # The line about this fault then went to the closed pipe.
        sandbox.wait(lambda seen: seen["token_requests"] > 0)
        sandbox.approve(device["user_code"])
        _, stderr = process.communicate(timeout=10)
    assert (process.returncode, login.saved()["account"]) == (75, ACCOUNT)
    assert re.fullmatch("xai-login: it is done, but the result cannot be printed.*\n", stderr)


# by browser


@pytest.fixture
def browser(login: Login, tmp_path: Path) -> Callable[[], str]:
    """A browser for the module webbrowser, which records the address that it is given."""
    program, opened = tmp_path / "browser", tmp_path / "opened"
    program.write_text(
        '#!/bin/sh\necho "noise"; echo "noise" >&2\n'
        f'echo "$1" > {opened}.new && mv {opened}.new {opened}\n'
    )
    program.chmod(0o755)
    login.env |= {"BROWSER": str(program), "DISPLAY": ":99"}

    def address() -> str:
        until(opened.exists)
        return opened.read_text().strip()

    return address


def test_browser_login_on_a_terminal(login: Login, sandbox: Sandbox, browser):
    # There is a browser: the default is --browser.
    with login.terminal() as terminal:
        url = browser()
        terminal.expect(re.escape(f"    {url}\r\n"))
        assert (
            "&plan=generic&referrer=xaiproxy" in url
            and "redirect_uri=http%3A%2F%2F127.0.0.1%3A" in url
        )
        with urllib.request.urlopen(sandbox.consent(url), timeout=5) as page:
            assert b"You can close this window" in page.read()
        assert terminal.end() == 0
        assert f"Signed in as {ACCOUNT}" in terminal.screen and "noise" not in terminal.screen
    login.holds_no_secret(terminal.screen)


@pytest.mark.parametrize("pasted", ["the address", "the code"])
def test_browser_login_with_a_pasted_address(login: Login, sandbox: Sandbox, browser, pasted: str):
    with login.terminal("--browser") as terminal:
        redirect = sandbox.consent(browser())
        terminal.expect("paste that here:")
        terminal.type("what now?\n")
        terminal.expect("That is not the response: it is neither a URL nor a code")
        terminal.type("not-a-code-of-the-issuer\n")
        terminal.expect(
            r"Still waiting: that code was refused \(invalid_grant.*\)\. Paste the code once more"
        )
        code = re.search("code=([^&]*)", redirect)[1]
        terminal.type(
            (f"{redirect[:70]}\n{redirect[70:]}" if pasted == "the address" else code) + "\n"
        )
        assert terminal.end() == 0
    assert login.saved()["account"] == ACCOUNT


def test_further_pasted_lines_do_not_reach_the_shell(login: Login, sandbox: Sandbox, browser):
    shell = ["sh", "-c", '"$@" --browser; read -r line; echo "shell: $line"', "sh", *COMMAND]
    with Terminal(shell, **login.options) as terminal:
        redirect = sandbox.consent(browser())
        terminal.expect("paste that here:")
        terminal.type(f"{redirect}\necho pasted\nand a half line")
        terminal.expect("Signed in as")
        terminal.expect("Next: ")
        terminal.type("typed later\n")
        assert terminal.expect("shell: (.*)\r\n")[1] == "typed later"


def test_a_refused_code_does_not_end_the_browser_login(login: Login, sandbox: Sandbox, browser):
    with login.start("--browser", "--json") as process:
        process.stdout.readline()
        redirect = sandbox.consent(browser())
        urllib.request.urlopen(re.sub("code=[^&]*", "code=forged", redirect), timeout=5).close()
        trouble = json.loads(process.stdout.readline())
        assert (
            trouble["event"] == "trouble"
            and "that code was refused (invalid_grant" in trouble["message"]
        )
        urllib.request.urlopen(redirect, timeout=5).close()
        rest, _ = process.communicate(timeout=10)
    assert json.loads(rest)["event"] == "done" and process.returncode == 0


def test_browser_login_prints_json_events(login: Login, sandbox: Sandbox, browser):
    with login.start("--browser", "--json") as process:
        event = json.loads(process.stdout.readline())
        assert event == {
            "event": "authorization_url",
            "url": browser(),
            "redirect_uri": event["redirect_uri"],
        }
        urllib.request.urlopen(sandbox.consent(event["url"]), timeout=5).close()
        rest, stderr = process.communicate(timeout=10)
    assert json.loads(rest)["event"] == "done" and (process.returncode, stderr) == (0, "")


def test_a_denied_browser_login_is_one_sentence(login: Login, sandbox: Sandbox, browser):
    with login.terminal("--browser") as terminal:
        urllib.request.urlopen(sandbox.consent(browser(), "deny"), timeout=5).close()
        assert terminal.end() == 77
        assert (
            "xai-login: the login was denied (access_denied: User denied); start again"
            in terminal.screen
        )
    assert login.files() == ["tokens.json.lock"]


def test_ctrl_c_ends_the_browser_login(login: Login, browser):
    with login.terminal("--browser") as terminal:
        terminal.expect("paste that here:")
        terminal.type(CTRL_C)
        assert terminal.end() == 130


@pytest.mark.parametrize(
    "environ, here",
    [
        ({"DISPLAY": ":0"}, True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, True),
        ({}, True),
        ({"BROWSER": ""}, False),
        ({"BROWSER": "", "DISPLAY": ":0", "PATH": "/nowhere"}, False),
        ({"DISPLAY": ":0", "SSH_CONNECTION": "192.0.2.1 1 192.0.2.2 22"}, False),
        ({"DISPLAY": ":0", "SSH_TTY": "/dev/pts/1"}, False),
    ],
)
def test_a_browser_is_opened_only_where_the_user_sees_it(environ: dict[str, str], here: bool):
    code = "import os; from xaiproxy.login import command; print(command.has_browser(os.environ))"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PATH": os.environ["PATH"], "BROWSER": "/bin/true", **environ},
        capture_output=True,
        text=True,
    )
    assert (result.stdout, result.stderr) == (f"{here}\n", "")


# --logout


def test_logout_revokes_and_removes_the_login(login: Login, sandbox: Sandbox):
    written = sandbox.write_login(login.path, account=ACCOUNT)
    for name in ("new", "refused", "corrupt-1", "refused.0a1b", "quota", "quota.0a1b"):
        (login.path.parent / f"tokens.json.{name}").write_text("")
    (login.path.parent / "client-keys").write_text("")
    result = login.run("--logout")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"Signed out: removed the login of {ACCOUNT} from {login.path}.\n"
    assert login.files() == ["client-keys", "tokens.json.lock"]
    assert (
        sandbox.counters()["revocations"] == 1
        and sandbox.refresh(written["refresh_token"])[0] == 400
    )
    again = login.run("--logout")
    assert (again.returncode, again.stdout) == (
        0,
        f"Nothing to sign out of: {login.path} does not exist.\n",
    )


def test_logout_without_the_issuer_removes_the_login(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path)
    sandbox.set(answers=[{"path": "/oauth2/revoke", "error": "bad_gateway"}])
    result = login.run("--logout", "--json")
    done, error = map(json.loads, result.stdout.splitlines())
    assert done == {"event": "signed_out", "revoked": False, "account": None}
    assert error["exit_code"] == result.returncode == 69
    assert re.search(
        "the login was removed here but not revoked, because .* HTTP 502", result.stderr
    )
    assert login.files() == ["tokens.json.lock"]


def test_logout_keeps_a_file_that_is_no_login(login: Login, sandbox: Sandbox):
    login.path.parent.mkdir()
    login.path.write_text("{half")
    result = login.run("--logout")
    assert result.returncode == 0
    assert "held no valid login, so nothing was revoked" in result.stdout
    assert login.files() == ["tokens.json.lock"] and sandbox.requests() == []


# start-up time


def test_help_begins_with_examples_and_does_not_import_the_http_client(login: Login):
    code = (
        "import sys\nfrom xaiproxy.login import command\ntry:\n    command.main()\nfinally:\n"
        "    assert not {'requests', 'ssl', 'dotenv', 'logging'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "--help"],
        text=True,
        capture_output=True,
        **login.options,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.index("  xai-login --device    ") < result.stdout.index("options:")

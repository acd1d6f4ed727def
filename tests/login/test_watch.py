"""xai-login --status --watch: in place on a terminal, and by changes in a pipe."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from login_command import ACCOUNT, COMMAND, Login
from sandbox import Sandbox, until
from scripted_server import ScriptedServer, answer
from terminal import CTRL_C, Terminal

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
HINT = "every 2 s; Ctrl-C ends"


class Screen:
    """The cells of a terminal without line breaks of its own, for the few sequences of --watch."""

    def __init__(self, rows: int, columns: int) -> None:
        self.size = rows, columns
        self.lines = [""] * rows
        self.scrolled = 0

    def feed(self, text: str) -> None:
        row = column = 0
        rows, columns = self.size
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if part == "\x1b[H":
                row = column = 0
            elif part == "\x1b[K":
                self.lines[row] = self.lines[row][:column]
            elif part == "\x1b[J":
                self.lines[row] = self.lines[row][:column]
                self.lines[row + 1 :] = [""] * (rows - row - 1)
            elif part == "\r":
                column = 0
            elif part == "\n" and row == rows - 1:
                self.scrolled += 1
            elif part == "\n":
                row += 1
            elif not part.startswith("\x1b"):
                line = self.lines[row].ljust(column)
                self.lines[row] = (line[:column] + part + line[column + len(part) :])[:columns]
                column += len(part)


def frames(terminal: Terminal) -> list[str]:
    """The complete frames so far."""
    inside = terminal.screen.partition(ENTER)[2].partition("^C")[0].partition(LEAVE)[0]
    return [frame for frame in inside.split("\x1b[H") if frame.endswith("\x1b[J")]


def next_frame(terminal: Terminal) -> str:
    """Wait for one frame more."""
    number = len(frames(terminal))
    terminal.expect(rf"(?s)(\x1b\[H.*?\x1b\[J.*?){{{number + 1}}}")
    return frames(terminal)[-1]


@pytest.fixture
def signed_in(login: Login, sandbox: Sandbox) -> Login:
    sandbox.write_login(login.path, account=ACCOUNT)
    login.env["NO_COLOR"] = "1"
    return login


def test_a_terminal_is_redrawn_in_place_until_ctrl_c(signed_in: Login):
    with signed_in.terminal("--status", "--watch") as terminal:
        terminal.expect(HINT)
        aside = signed_in.path.rename(signed_in.path.with_name("aside"))
        terminal.expect("Not signed in:")
        aside.rename(signed_in.path)
        terminal.expect(rf"(?s)Not signed in:.*Account .*{HINT}\x1b\[K\x1b\[J")
        terminal.type(CTRL_C)
        assert terminal.end() == 0
        assert "interrupted" not in terminal.screen and "Traceback" not in terminal.screen
        seen = frames(terminal)
        # Nothing is erased before it is written over, and the last line does not scroll.
        assert "\x1b[2J" not in terminal.screen
        screen = Screen(50, 100)
        shown = []
        for frame in seen:
            screen.feed("\x1b[H" + frame)
            shown.append([line for line in screen.lines if line])
        assert screen.scrolled == 0
        assert [lines[-1].endswith(HINT) for lines in shown] == [True] * len(shown)
        assert len(shown[0]) == len(shown[-1]) > min(len(lines) for lines in shown)
        # The last state stays, with the terminal as it was.
        before, _, after = terminal.screen.rpartition(LEAVE)
        assert before.startswith(ENTER) and after.startswith("Not serving: neither the proxy")
        assert f"Account     {ACCOUNT}" in after and "\x1b[?" not in after


def test_a_resize_is_followed_at_once(signed_in: Login):
    with signed_in.terminal("--status", "--watch", columns=120) as terminal:
        terminal.expect(HINT)
        for rows, columns in ((40, 40), (6, 30), (30, 200)):
            terminal.resize(rows, columns)
            # A frame that was begun before the resize may come first.
            screen = Screen(rows, columns)
            until(lambda: fits(next_frame(terminal), screen), seconds=10)
        terminal.type(CTRL_C)
        assert terminal.end() == 0


def fits(frame: str, screen: Screen) -> bool:
    lines = re.sub(r"\x1b\[.", "", frame).split("\r\n")
    rows, columns = screen.size
    if len(lines) > rows or any(len(line) >= columns for line in lines):
        return False
    screen.feed("\x1b[H" + frame)
    assert [line.rstrip() for line in screen.lines[: len(lines)]] == [
        line.rstrip() for line in lines
    ]
    return screen.scrolled == 0 and (columns < 200 or len(lines) < 15)


def test_ctrl_z_leaves_the_shell_its_screen(signed_in: Login):
    shell = ["sh", "-i"]
    environ = signed_in.env | {"PS1": "$ "}
    with Terminal(shell, **signed_in.options | {"env": environ}) as terminal:
        terminal.expect(r"\$ ")
        terminal.type(" ".join([*COMMAND, "--status", "--watch"]) + "\n")
        terminal.expect(HINT)
        terminal.type("\x1a")
        terminal.expect("(?s)" + re.escape(LEAVE) + r".*Stopped.*\$ ")
        terminal.type("fg\n")
        terminal.expect("(?s)Stopped.*" + re.escape(ENTER) + ".*" + HINT)
        terminal.type(CTRL_C)
        terminal.expect("(?s)Stopped.*" + re.escape(LEAVE) + r".*Token file.*\$ ")
        terminal.type("exit $?\n")
        assert terminal.end() == 0


def test_sigterm_restores_the_terminal(signed_in: Login):
    with signed_in.terminal("--status", "--watch") as terminal:
        terminal.expect(HINT)
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 143
        assert LEAVE in terminal.screen


def test_a_dumb_terminal_gets_blocks_without_escape_sequences(signed_in: Login):
    with signed_in.terminal("--status", "--watch", TERM="dumb") as terminal:
        terminal.expect("Token file")
        signed_in.path.unlink()
        terminal.expect("(?s)\r\n\r\nNot signed in: .*Token file")
        terminal.type(CTRL_C)
        assert terminal.end() == 0 and "\x1b" not in terminal.screen


class Polls:
    """A program at the proxy's address, which counts the polls of a watch."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server

    def wait(self) -> None:
        """Wait until one summary more has been made completely."""
        before = len(self.server.requests)
        until(lambda: len(self.server.requests) > before + 1, seconds=20)


@pytest.fixture
def polled(signed_in: Login):
    with ScriptedServer(answer(200, {"status": "up"})) as server:
        signed_in.env["XAI_PROXY_PORT"] = str(server.port)
        yield Polls(server)


def test_a_pipe_gets_a_json_line_for_each_change(signed_in: Login, polled: Polls):
    lock = signed_in.path.with_name("tokens.json.lock")
    lock.touch()
    with signed_in.start("--status", "--watch", "--json") as process:
        first = json.loads(process.stdout.readline())
        # A heartbeat is no change.
        os.utime(lock)
        polled.wait()
        signed_in.path.rename(signed_in.path.with_name("aside"))
        second = json.loads(process.stdout.readline())
        signed_in.path.with_name("aside").rename(signed_in.path)
        third = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=10)
    assert (process.returncode, rest, stderr) == (0, "", "")
    assert [event["verdict"] for event in (first, second, third)] == ["good", "no_login", "good"]
    assert first["refresher_seen_at"] < third["refresher_seen_at"]


def test_a_pipe_gets_a_block_for_each_change(signed_in: Login, polled: Polls):
    with signed_in.start("--status", "--watch") as process:
        polled.wait()
        signed_in.path.unlink()
        polled.wait()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=10)
    assert (process.returncode, stderr) == (0, "")
    first, second = stdout.split("\n\n")
    assert first.startswith("Not serving: ") and second.startswith("Not signed in: ")
    assert "\x1b" not in stdout


def test_a_watch_whose_reader_is_gone_ends(signed_in: Login):
    with signed_in.start("--status", "--watch") as process:
        process.stdout.readline()
        process.stdout.close()
        signed_in.path.unlink()
        stderr = process.stderr.read()
    assert process.wait(10) == 75
    assert re.fullmatch("xai-login: the watch ends: the result cannot be printed: .*\n", stderr)


def test_the_quota_is_asked_once(signed_in: Login, sandbox: Sandbox, polled: Polls):
    sandbox.reset()
    with signed_in.start("--status", "--watch", "--quota", "--json") as process:
        assert json.loads(process.stdout.readline())["quota"]["used_percent"] == 37.5
        polled.wait()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert len(sandbox.requests("/v1/billing")) == 1

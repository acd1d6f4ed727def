"""xai-serve: real processes, most of them on a terminal, in folders that must stay as they were."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from proxy_process import Client
from refresher_process import mounts
from sandbox import Sandbox
from scripted_server import ScriptedServer, answer
from supervised import BIN
from terminal import CTRL_C, Terminal

from xaiproxy import serve_command

SERVE = str(BIN / "xai-serve")
READY = r"proxy: ready: (http://127\.0\.0\.1:(\d+)/v1); try: (curl .*)\r\n"
CHAT = json.dumps({"model": "grok-4.5", "messages": [], "stream": True}).encode()


def environment(folder: Path, sandbox: Sandbox, **settings: str) -> dict[str, str]:
    """An environment with a login, in which HOME and the working directory are empty."""
    login = folder / "login" / "tokens.json"
    sandbox.write_login(login)
    for name in ("home", "cwd"):
        (folder / name).mkdir(parents=True)
    return {
        "PATH": os.defpath,
        "HOME": str(folder / "home"),
        "XAI_PROXY_PORT": "0",
        **sandbox.env,
        "XAI_PROXY_TOKEN_PATH": str(login),
        **settings,
    }


@contextlib.contextmanager
def serving(
    folder: Path, sandbox: Sandbox, *, prefix: tuple[str, ...] = (), **settings: str
) -> Iterator[Terminal]:
    """xai-serve on a terminal, once it is ready, and its port: `terminal.port`."""
    environ = environment(folder, sandbox, **settings)
    with Terminal([*prefix, SERVE], cwd=folder / "cwd", env=environ) as terminal:
        terminal.port = int(terminal.expect(READY, 30)[2])
        yield terminal
    assert os.listdir(folder / "home") == os.listdir(folder / "cwd") == []


def refused(*arguments: str, prefix: tuple[str, ...] = (), **options: Any) -> tuple[int, str]:
    """The exit status and the one sentence of an xai-serve that does not start."""
    done = subprocess.run(
        [*prefix, SERVE, *arguments], capture_output=True, text=True, timeout=30, **options
    )
    assert done.stdout == ""
    [sentence] = done.stderr.splitlines()
    return done.returncode, sentence


def children(terminal: Terminal) -> list[int]:
    pid = terminal.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def open_stream(client: Client) -> None:
    client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=CHAT)
    assert client.head().status == 200
    assert client.chunk().startswith(b"data: ")


def test_the_start_ends_with_ready_and_a_second_one_is_refused(tmp_path, sandbox):
    with serving(tmp_path, sandbox) as terminal:
        curl = terminal.expect(READY)[3]
        done = subprocess.run(["sh", "-c", f"{curl} -sS"], capture_output=True, timeout=20)
        assert done.stderr == b"" and json.loads(done.stdout)["object"] == "list"
        environ = environment(tmp_path / "second", sandbox, XAI_PROXY_PORT=str(terminal.port))
        assert refused(env=environ) == (
            78,
            f"xai-serve: an xaiproxy already serves http://127.0.0.1:{terminal.port}/v1; use that "
            "one, or stop it, or choose another port with --port",
        )
        programs = children(terminal)
        terminal.type(CTRL_C)
        assert terminal.end(20) == 0
    assert len(programs) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in programs)
    # supervisord's own lines are those of a terminal: warnings, and no steps of the start.
    assert "spawned" not in terminal.screen and "Traceback" not in terminal.screen
    assert terminal.screen.count("received SIGINT") == 1


def test_ctrl_c_before_the_start_is_one_sentence_and_130(tmp_path, sandbox):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = environment(tmp_path, sandbox, XAI_PROXY_PORT=str(silent.getsockname()[1]))
        with (
            Terminal([SERVE], cwd=tmp_path, env=environ) as terminal,
            # One connection shows that a program listens, and one asks whether it is a proxy.
            silent.accept()[0],
            silent.accept()[0],
        ):
            terminal.type(CTRL_C)
            assert terminal.end(20) == 130
    assert terminal.screen.endswith("\r\nxai-serve: interrupted\r\n")
    assert "Traceback" not in terminal.screen


@pytest.mark.parametrize(
    "reply, reason",
    [(answer(404, "Not found", "text/plain"), ""), (lambda client: client.recv(1), r" \(.*\)")],
)
def test_another_program_at_the_address_is_one_sentence_and_78(tmp_path, sandbox, reply, reason):
    with ScriptedServer(reply) as other:
        environ = environment(tmp_path, sandbox, XAI_PROXY_PORT=str(other.port))
        status, sentence = refused(env=environ)
    assert status == 78
    assert re.fullmatch(
        f"xai-serve: another program listens on {other.url}{reason}; stop that, or choose another "
        "port with --port or XAI_PROXY_PORT",
        sentence,
    )


def test_a_former_program_at_the_address_may_end_meanwhile(tmp_path, sandbox):
    with socket.create_server(("127.0.0.1", 0)) as former:
        former.settimeout(20)
        environ = environment(tmp_path, sandbox, XAI_PROXY_PORT=str(former.getsockname()[1]))
        with Terminal([SERVE], cwd=tmp_path / "cwd", env=environ) as terminal:
            for _ in range(3):
                former.accept()[0].close()
            former.close()
            terminal.expect(READY, 30)
            terminal.process.terminate()
            assert terminal.end(20) == 0


def test_a_second_ctrl_c_aborts_open_responses(tmp_path, sandbox):
    sandbox.set(events=1_000_000, events_per_second=20)
    with (
        serving(tmp_path, sandbox, XAI_PROXY_DRAIN_TIMEOUT="3000") as terminal,
        Client(terminal.port) as client,
    ):
        open_stream(client)
        terminal.type(CTRL_C)
        terminal.expect("1 open responses have 3000 s")
        terminal.type(CTRL_C)
        terminal.expect("aborting 1 open responses")
        assert terminal.end(20) == 0
    assert "Traceback" not in terminal.screen


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_ends_it_unless_nohup_started_it(tmp_path, sandbox, nohup):
    environ = environment(tmp_path, sandbox)
    log = tmp_path / "log"
    # nohup(1) leaves a stdout alone that is no terminal.
    command = ["sh", "-c", f'exec nohup "$0" >{log} 2>&1', SERVE] if nohup else [SERVE]
    with Terminal(command, cwd=tmp_path / "cwd", env=environ) as terminal:
        if nohup:
            while not (log.exists() and '"ready: ' in log.read_text()):
                time.sleep(0.05)
        else:
            terminal.expect(READY, 30)
        terminal.close()
        if nohup:
            with pytest.raises(subprocess.TimeoutExpired):
                terminal.process.wait(1.5)
            terminal.process.terminate()
        assert terminal.process.wait(20) == 0


def test_it_runs_in_a_deleted_working_directory(tmp_path, sandbox):
    gone = tmp_path / "gone"
    prefix = ("sh", "-c", f'mkdir {gone}; cd {gone}; rmdir {gone}; exec "$@"', "sh")
    with serving(tmp_path, sandbox, prefix=prefix) as terminal:
        terminal.type(CTRL_C)
        assert terminal.end(20) == 0


@mounts
def test_it_runs_where_only_the_login_can_be_written(tmp_path, sandbox):
    login = tmp_path / "login"
    script = (
        f"mkdir -p {login}; mount --bind {login} {login}; "
        "for folder in /tmp /var/tmp /dev/shm; do "
        "mount --rbind $folder $folder; mount -o remount,bind,ro $folder; done; "
        'mount -o remount,bind,ro /; cd "$PWD"; '
        'if touch here /tmp/here /dev/shm/here 2>/dev/null; then exit 1; fi; exec "$@"'
    )
    prefix = ("unshare", "-rm", "sh", "-ec", script, "sh")
    with serving(tmp_path, sandbox, prefix=prefix) as terminal:
        terminal.type(CTRL_C)
        assert terminal.end(20) == 0


def test_a_dotenv_of_the_working_directory_counts_below_an_option(tmp_path, sandbox):
    environ = environment(tmp_path, sandbox, XAI_PROXY_PORT="1")
    del environ["XAI_PROXY_UPSTREAM"]
    dotenv = f"XAI_PROXY_UPSTREAM={sandbox.url}\nXAI_PROXY_BIND=127.1.2.3\n"
    (tmp_path / "cwd" / ".env").write_text(dotenv)
    command = [SERVE, "--bind", "127.0.0.1", "--port", "0"]
    with Terminal(command, cwd=tmp_path / "cwd", env=environ) as terminal:
        with Client(int(terminal.expect(READY, 30)[2])) as client:
            assert client.ask("GET", "/v1/models").status == 200
        terminal.process.terminate()
        assert terminal.end(20) == 0


def test_a_wrong_setting_is_one_sentence_and_78(tmp_path, sandbox):
    environ = environment(tmp_path, sandbox, XAI_PROXY_REFRESH_SKEW="x")
    status, sentence = refused(env=environ, cwd=tmp_path)
    assert status == 78 and sentence.startswith("xai-serve: XAI_PROXY_REFRESH_SKEW must be ")


def test_too_few_file_descriptors_are_one_sentence_and_78(tmp_path, sandbox):
    status, sentence = refused(
        env=environment(tmp_path, sandbox),
        prefix=("unshare", "--user") if os.getuid() == 0 else (),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500)),
    )
    assert status == 78 and re.match("xai-serve: .*file descriptors.* 1024 ", sentence), sentence


def test_without_a_terminal_supervisord_logs_its_steps_in_json(tmp_path, sandbox):
    process = subprocess.Popen(
        [SERVE],
        cwd=tmp_path,
        env=environment(tmp_path, sandbox),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    with process:
        lines = []
        while not lines or not lines[-1]["message"].startswith("ready: "):
            lines.append(json.loads(process.stdout.readline()))
        process.terminate()
        lines += map(json.loads, process.stdout)
    assert process.returncode == 0
    messages = [line["message"] for line in lines if line["process"] == "supervisord"]
    assert f"supervisord started with pid {process.pid}" in messages
    assert [line for line in messages if line.startswith("spawned: 'proxy'")]


def test_its_configuration_is_that_of_the_checkout():
    assert serve_command.CONF.samefile(ROOT / "conf" / "supervisord.conf")

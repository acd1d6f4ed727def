"""conf/supervisord.conf and the plug-in: real processes, read through a pipe, as in a container, or
from a terminal.
"""

import calendar
import configparser
import contextlib
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import pytest
from checkout import ROOT
from proxy_process import Client
from refresher_process import mounts, wait_until
from sandbox import until
from supervised import BIN, CONF, Supervised
from terminal import Terminal

from xaiproxy import config
from xaiproxy.refresher import renewal

CHAT = json.dumps({"model": "grok-4.5", "messages": [], "stream": True}).encode()


def open_stream(client):
    """Begin a streamed chat; return once its first event is there."""
    client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=CHAT)
    assert client.head().status == 200
    assert client.chunk().startswith(b"data: ")


def rest_of_stream(client):
    return b"".join(iter(client.chunk, b""))


def stand_ins(folder, conf=CONF, **programs):
    """`conf` with shell scripts in place of xai-NAME."""
    text = conf.read_text()
    for name, script in programs.items():
        program = folder / f"stand-in-{name}"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        text = text.replace(f"command=xai-{name}\n", f"command={program}\n")
    stand_in = folder / "stand-ins.conf"
    stand_in.write_text(text)
    return stand_in


def edited_conf(folder, **settings):
    """The real conf with other values for some of its settings."""
    text = CONF.read_text()
    for name, value in settings.items():
        text, count = re.subn(rf"(?m)^{name}=.*$", f"{name}={value}", text)
        assert count
    conf = folder / "edited.conf"
    conf.write_text(text)
    return conf


SIGTERM_RECEIVED = "received SIGTERM indicating exit request"
FAILING = "echo no room >&2; exit 75"
SLOW_TO_STOP = "trap 'sleep 2; exit 0' TERM; while :; do sleep 0.1; done"
STAY = "while :; do sleep 0.05; done"


def quick_to_stop(first=":"):
    """A program that runs `first` when it is ready for SIGTERM."""
    return f"trap 'echo got SIGTERM; exit 0' TERM\n{first}\n{STAY}"


QUICK_TO_STOP = quick_to_stop()


def test_sigterm_drains_the_proxy_before_the_refresher_stops_and_ends_with_0(tmp_path, sandbox):
    sandbox.set(events=10, events_per_second=10)
    # The leftover of a supervisord that was killed.
    (tmp_path / "supervisord.pid").write_text("1\n")
    with Supervised(tmp_path, sandbox) as supervised, supervised.client() as client:
        assert client.ask("GET", "/v1/models").status == 200
        open_stream(client)
        supervised.signal(signal.SIGTERM)
        assert rest_of_stream(client).endswith(b"data: [DONE]\n\n")
        assert supervised.ended() == 0
    log = "".join(supervised.lines)
    assert (
        0
        < log.index("stopped: proxy (exit status 0)")
        < log.index("stopped: refresher (exit status 0)")
    )
    as_root = [line for line in supervised.complaints() if "running as root" in line]
    assert len(as_root) == (os.getuid() == 0)
    assert set(supervised.complaints()) - set(as_root) == {SIGTERM_RECEIVED}
    assert not (tmp_path / "supervisord.pid").exists()


def test_ctrl_c_does_not_wait_for_the_delay(tmp_path, sandbox):
    conf = edited_conf(tmp_path, startsecs=0)
    with Supervised(tmp_path, sandbox, conf=conf, XAI_PROXY_DRAIN_DELAY="60") as supervised:
        supervised.client().close()
        supervised.signal(signal.SIGINT)
        assert supervised.ended() == 0


def test_a_killed_proxy_is_restarted(tmp_path, sandbox):
    with Supervised(tmp_path, sandbox, conf=edited_conf(tmp_path, startsecs=0)) as supervised:
        with supervised.client() as client:
            assert client.ask("GET", "/v1/models").status == 200
        os.kill(supervised.pids()["proxy"], signal.SIGKILL)
        with supervised.client(start=2) as client:
            assert client.ask("GET", "/v1/models").status == 200


@pytest.mark.parametrize("startsecs", [5, 0])
def test_a_program_that_ends_with_78_is_not_started_again_and_ends_all_with_70(
    tmp_path, sandbox, startsecs
):
    """Both while it counts as starting (5), and after it has started (0). The other one drains."""
    sandbox.set(events=10, events_per_second=10)
    conf = stand_ins(
        tmp_path,
        edited_conf(tmp_path, startsecs=startsecs),
        refresher="until [ -e wrong ]; do sleep 0.05; done; echo a wrong setting >&2; exit 78",
    )
    with Supervised(tmp_path, sandbox, conf=conf) as supervised, supervised.client() as client:
        open_stream(client)
        (tmp_path / "wrong").touch()
        rest = rest_of_stream(client)
        assert rest.count(b"data: ") > 1 and rest.endswith(b"data: [DONE]\n\n")
        assert supervised.ended() == 70
    log = "".join(supervised.lines)
    assert log.count("a wrong setting") == log.count("spawned: 'refresher'") == 1
    [reason] = [line for line in supervised.complaints() if line.startswith("refresher ")]
    assert re.search("exit status 78.* ending with status 70", reason) and len(reason) < 300
    assert log.index(reason) < log.index("stopped: proxy (exit status 0)")


def test_a_program_that_cannot_be_kept_running_ends_all_with_70(tmp_path, sandbox):
    conf = stand_ins(
        tmp_path, edited_conf(tmp_path, startretries=0), refresher=FAILING, proxy=QUICK_TO_STOP
    )
    with Supervised(tmp_path, sandbox, conf=conf) as supervised:
        assert supervised.ended() == 70
    supervised.wait_for_line(r'critical".*"refresher cannot be kept running .* with status 70')
    supervised.wait_for_line(r"stopped: proxy \(exit status 0\)")


def test_sigterm_while_a_program_waits_for_its_next_start_ends_with_0(tmp_path, sandbox):
    # supervisord makes that one FATAL then, and goes on to stop the other.
    with Supervised(
        tmp_path, sandbox, conf=stand_ins(tmp_path, proxy=FAILING, refresher=SLOW_TO_STOP)
    ) as supervised:
        supervised.wait_for_line("exited: proxy", times=2)  # the next start is two seconds off
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0


def test_the_programs_end_when_supervisord_is_killed(tmp_path, sandbox):
    conf = stand_ins(tmp_path, refresher=quick_to_stop("echo up"), proxy=quick_to_stop("echo up"))
    with Supervised(tmp_path, sandbox, conf=conf) as supervised:
        supervised.wait_for_line('"up"', times=2)
        ends = [os.pidfd_open(pid) for pid in supervised.pids().values()]
        supervised.signal(signal.SIGKILL)
        assert all(readable(end, 10) for end in ends)
    for end in ends:
        os.close(end)


def test_sigterm_right_after_the_fork_is_not_lost():
    """The signal comes before the program has replaced supervisord, whose handler would take it."""
    code = """if True:
        import os, signal
        from xaiproxy import supervision
        signal.signal(signal.SIGTERM, lambda *_: None)
        os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
        pid = supervision.fork(None)
        if pid == 0:
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        timeout=20,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"{-signal.SIGTERM}\n", "")


def readable(fd, seconds):
    return bool(select.select([fd], [], [], seconds)[0])


@pytest.mark.parametrize("nohup", [(), ("nohup",)])
def test_a_closed_terminal_ends_all_unless_nohup_started_it(tmp_path, sandbox, nohup):
    conf = stand_ins(tmp_path, refresher=QUICK_TO_STOP, proxy=QUICK_TO_STOP)
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with Terminal(
        [*nohup, str(BIN / "supervisord"), "-c", str(conf)], cwd=tmp_path, env=environ
    ) as terminal:
        log = tmp_path / "nohup.out"
        wait_until(
            lambda: log.exists() and "spawned: 'proxy'" in log.read_text()
        ) if nohup else terminal.expect("spawned: 'proxy'")
        terminal.close()
        if nohup:
            with pytest.raises(subprocess.TimeoutExpired):
                # Its loop turns once a second.
                terminal.process.wait(1.5)
            assert "SIGHUP" not in log.read_text()
            terminal.process.terminate()
        assert terminal.process.wait(20) == 0
        output = log.read_text() if nohup else terminal.screen
        pids = re.findall(r"spawned: .* with pid (\d+)", output)
        assert len(pids) == 2 and not any(Path("/proc", pid).exists() for pid in pids)


@pytest.mark.parametrize("prefix", [(), ("nohup",)])
def test_sighup_reaches_both_programs_and_restarts_neither(tmp_path, sandbox, prefix):
    sandbox.set(
        answers=[
            {
                "path": "/oauth2/token",
                "grant_type": "refresh_token",
                "error": "unavailable",
                "headers": {"Retry-After": "300"},
                "times": 1,
            }
        ]
    )
    with Supervised(tmp_path, sandbox, prefix=prefix) as supervised:
        supervised.client().close()
        expired = int(time.time()) - 1
        sandbox.write_login(supervised.environ["XAI_PROXY_TOKEN_PATH"], expires_at=expired)
        until(lambda: not sandbox.get("/_sandbox/knobs")[1]["answers"], 20)
        (tmp_path / ".env").write_text("XAI_PROXY_LOG_LEVEL=debug\n")
        refreshes = sandbox.counters()["refreshes"]
        supervised.signal(signal.SIGHUP)
        supervised.wait_for_line("SIGHUP: the log level is debug")
        sandbox.wait(lambda counters: counters["refreshes"] > refreshes)
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0
    assert "".join(supervised.lines).count("spawned: ") == 2


def test_lines_of_two_programs_are_not_mixed(tmp_path, sandbox):
    """Not even lines written in pieces, as a traceback is, or without a line end."""
    conf = stand_ins(
        tmp_path,
        proxy=quick_to_stop("sleep 0.3; echo a whole line; touch go"),
        refresher="trap 'printf last; exit 0' TERM; printf 'the first half '\n"
        f"until [ -e go ]; do sleep 0.05; done; echo and the second\n{STAY}",
    )
    with Supervised(tmp_path, sandbox, conf=conf) as supervised:
        supervised.wait_for_line('"the first half and the second"}\n')
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0
    assert {
        ("proxy", "a whole line"),
        ("proxy", "got SIGTERM"),
        ("refresher", "last"),
    } <= {(line["process"], line["message"]) for line in map(json.loads, supervised.lines)}


# The format of all lines

TEXT = re.compile(r"(20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ([A-Z]+) (\w+): (.+)\n")
# Python writes a traceback in several lines, and not to the log.
CRASHING = f"exec {sys.executable} -c 'import no_such_module'"


def parsed(line):
    """The time, level, process and message of a line of either format."""
    if match := TEXT.fullmatch(line):
        return "text", match[1], match[2].lower(), match[3], match[4]
    entry = json.loads(line)
    assert list(entry)[:4] == ["time", "level", "process", "message"]
    return "json", *list(entry.values())[:4]


@pytest.mark.parametrize(
    "pipe, environ, dotenv, format",
    [
        (os.pipe, "", "", "json"),
        (os.openpty, "", "", "text"),
        (os.openpty, "json", "text", "json"),
        (os.pipe, "", "text", "text"),
    ],
)
def test_all_lines_have_one_format_and_one_time_zone(
    tmp_path, sandbox, pipe, environ, dotenv, format
):
    (tmp_path / ".env").write_text(f"XAI_PROXY_LOG_FORMAT={dotenv}\n")
    settings = {"XAI_PROXY_LOG_FORMAT": environ, "TZ": "Asia/Tokyo"}
    began = time.time()
    with Supervised(tmp_path, sandbox, pipe=pipe, **settings) as supervised:
        supervised.client().close()
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0
    lines = [parsed(line) for line in supervised.lines]
    assert {line[0] for line in lines} == {format}
    assert {line[3] for line in lines} == {"supervisord", "refresher", "proxy"}
    assert {line[2] for line in lines if line[3] == "supervisord"} >= {"info", "warning"}
    stamps = [calendar.timegm(time.strptime(line[1][:19], "%Y-%m-%dT%H:%M:%S")) for line in lines]
    assert int(began) <= min(stamps) and max(stamps) <= time.time()


@pytest.mark.parametrize("pipe, format", [(os.pipe, "json"), (os.openpty, "text")])
def test_what_a_program_writes_outside_of_its_log_becomes_log_lines(
    tmp_path, sandbox, pipe, format
):
    conf = stand_ins(
        tmp_path,
        edited_conf(tmp_path, startretries=0),
        refresher=CRASHING,
        proxy=quick_to_stop("printf 'a key: xaip_of-the-laptop\\n\\n\\033[31m\\377\\n'"),
    )
    with Supervised(tmp_path, sandbox, pipe=pipe, conf=conf) as supervised:
        assert supervised.ended() == 70
    lines = [parsed(line) for line in supervised.lines]
    assert {line[0] for line in lines} == {format}
    traceback = [line[4] for line in lines if line[3] == "refresher"]
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "ModuleNotFoundError: No module named 'no_such_module'"
    escape = "\\x1b" if format == "text" else "\x1b"
    assert [line[2:] for line in lines if line[3] == "proxy"] == [
        ("error", "proxy", "a key: [secret]"),
        ("error", "proxy", f"{escape}[31m\ufffd"),
        ("error", "proxy", "got SIGTERM"),
    ]


@pytest.mark.parametrize(
    "wrong, pipe, format",
    [
        ("XAI_PROXY_REFRESH_SKEW=x", os.pipe, "json"),
        ("XAI_PROXY_LOG_FORMAT=xml", os.openpty, "text"),
        ("XAI_PROXY_LOG_FORMT=json", os.openpty, "text"),
        ("XAI_PROXY_PORT='1", os.pipe, "json"),
    ],
)
def test_a_wrong_setting_is_named_once_by_each_program(tmp_path, sandbox, wrong, pipe, format):
    """In a log line, and even in .env, which supervisord reads, too."""
    (tmp_path / ".env").write_text(wrong + "\n")
    with Supervised(tmp_path, sandbox, pipe=pipe) as supervised:
        assert supervised.ended() == 70
    lines = [parsed(line) for line in supervised.lines]
    assert {line[0] for line in lines} == {format}
    name = wrong.partition("=")[0]
    naming = [line[3] for line in lines if line[3] != "supervisord" and name in line[4]]
    assert "refresher" in naming and len(naming) == len(set(naming)), lines
    log = "".join(supervised.lines)
    assert log.count("spawned: ") == 2 and log.count(" cannot be kept running ") == 1


def test_a_traceback_of_supervisord_is_one_line():
    code = """if True:
        from supervisor import loggers
        from xaiproxy import supervision
        supervision.write_lines_to(supervision.Output("json"))
        logger = loggers.getLogger()
        loggers.handle_stdout(logger, "")
        try:
            # The limit of a traceback cuts it in the middle of the token.
            raise ValueError("x " * 2000 + "eyJhbGciOiJFUzI1NiJ9." + "secret" * 200 + " x" * 730)
        except ValueError:
            import traceback
            logger.critical("unknown problem:" + traceback.format_exc())
        logger.error("%(what)s", what="%d")
        logger.close()
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, timeout=20, capture_output=True
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert done.stderr == b"" and "secret" not in first["traceback"].replace("[secret]", "")
    assert first["message"] == "unknown problem:Traceback (most recent call last):"
    assert first["level"] == "critical" and first["traceback"].endswith(" x x\n")
    assert (second["level"], second["message"]) == ("error", "%d")


@mounts
def test_a_read_only_file_system_without_a_temporary_folder_suffices(tmp_path, sandbox):
    """With the image's environment; /dev/shm, which the container runtimes mount, is writable."""
    image = dict(re.findall(r"(?m)^ENV (\w+)=(\S+)$", (ROOT / "Dockerfile").read_text()))
    conf = stand_ins(tmp_path, refresher=QUICK_TO_STOP, proxy=QUICK_TO_STOP)
    script = (
        "for folder in /tmp /var/tmp; do "
        "mount --rbind $folder $folder; mount -o remount,bind,ro $folder; done; "
        'mount -o remount,bind,ro /; cd "$PWD"; '
        'if touch here 2>/dev/null; then exit 1; fi; exec "$@"'
    )
    with Supervised(
        tmp_path,
        sandbox,
        conf=conf,
        prefix=("unshare", "-rm", "sh", "-ec", script, "sh"),
        TMPDIR=image.get("TMPDIR", ""),
    ) as supervised:
        supervised.wait_for_line("spawned: 'proxy'")
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0
    supervised.wait_for_line("could not write pidfile")


def test_supervision_works_without_standard_streams(tmp_path, sandbox):
    """Files that are opened later must not get the descriptors of the standard streams."""
    port = free_port()
    with Supervised(
        tmp_path,
        sandbox,
        XAI_PROXY_PORT=str(port),
        prefix=("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"),
    ) as supervised:
        wait_for_models(port)
        assert {os.readlink(f"/proc/{supervised.process.pid}/fd/{fd}") for fd in range(3)} == {
            os.devnull
        }
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0
    assert (tmp_path / "login" / "tokens.json.lock").read_bytes() == b"" and supervised.lines == []


@pytest.mark.skipif(
    os.getuid() != 0, reason="the other tests show it, since they were not run by root"
)
def test_supervision_works_for_a_user_without_privileges(tmp_path, sandbox):
    # A user namespace without a mapping: no capability and an unknown user, but files still open.
    if subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode:
        pytest.skip("unshare --user does not work here")
    with Supervised(tmp_path, sandbox, prefix=("unshare", "--user")) as supervised:
        with supervised.client() as client:
            assert client.ask("GET", "/v1/models").status == 200
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0
    assert supervised.complaints() == [SIGTERM_RECEIVED]


def test_a_stdout_that_cannot_be_opened_again_gets_every_line(tmp_path, sandbox):
    def journal():
        return [end.detach() for end in socket.socketpair()]

    script = quick_to_stop("echo up")
    conf = stand_ins(tmp_path, refresher=script, proxy=script)
    with Supervised(tmp_path, sandbox, pipe=journal, conf=conf) as supervised:
        supervised.wait_for_line('"up"', times=2)
        supervised.signal(signal.SIGTERM)
        assert supervised.ended() == 0
        supervised.wait_for_line('"got SIGTERM"', times=2)
        supervised.wait_for_line(r"stopped: refresher \(exit status 0\)")


def test_documented_stop_timeouts_are_long_enough():
    """The proxy drains, and then a refresh that has begun is completed and saved."""
    needed = (
        float(config.SETTINGS["XAI_PROXY_DRAIN_TIMEOUT"].metadata["default"])
        + renewal.DEADLINE
        + 10
    )
    pattern = re.compile(
        r"(--stop-timeout|stop_grace_period:|terminationGracePeriodSeconds:|TimeoutStopSec="
        r"|ExitTimeOut</key>\s*<integer>) ?(\d+)"
    )
    found = {}
    for path in subprocess.check_output(
        ["git", "ls-files", "*.md", "*.yaml", "*.yml", "conf", "Dockerfile"], cwd=ROOT, text=True
    ).splitlines():
        found[path] = [float(match[2]) for match in pattern.finditer((ROOT / path).read_text())]
    assert found["docs/docker.md"] and found["Dockerfile"] and found["conf/launchd/xaiproxy.plist"]
    assert min(itertools.chain.from_iterable(found.values())) >= needed, (needed, found)
    conf = configparser.RawConfigParser()
    conf.read(CONF)
    assert conf.getfloat("program:refresher", "stopwaitsecs") >= renewal.DEADLINE + 10
    # What XAI_PROXY_DRAIN_DELAY and XAI_PROXY_DRAIN_TIMEOUT accept at most.
    assert conf.getfloat("program:proxy", "stopwaitsecs") >= 300 + 3500 + 10


def test_the_conf_leaves_the_settings_to_the_environment():
    settings = [line for line in CONF.read_text().splitlines() if not line.startswith(";")]
    assert not [
        line for line in settings if "XAI_PROXY_" in line or "%(" in line or "environment" in line
    ]


CONTROL_SOCKET = """
[unix_http_server]
file=%(here)s/control.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://%(here)s/control.sock
"""


def test_an_unread_stdout_blocks_no_request(tmp_path, sandbox):
    sandbox.set(events=1_000_000, events_per_second=20)
    with contextlib.ExitStack() as stack:
        # A restart of supervisord closes the descriptors from 5 on.
        prefix = ("sh", "-c", 'exec "$@" 3<&0 4<&0', "sh")
        conf = tmp_path / "controlled.conf"
        conf.write_text(CONF.read_text() + CONTROL_SOCKET)
        supervised = stack.enter_context(
            Supervised(tmp_path, sandbox, prefix=prefix, conf=conf, XAI_PROXY_DRAIN_TIMEOUT="0")
        )
        supervised.client().close()
        subprocess.run([BIN / "supervisorctl", "-c", conf, "reload"], check=True, timeout=20)
        streaming = stack.enter_context(supervised.client(2))
        supervised.stop_reading()
        open_stream(streaming)

        # Each request is a log line; most cost the sandbox nothing.
        def ask(times):
            with supervised.client(2) as client:
                for _ in range(times):
                    ask_for_nothing(client)
                    assert client.ask("GET", "/v1/models").status == 200

        with futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, [4] * 4))
        # supervisord dropped them, and the proxy's metrics and --status report it.
        with supervised.client(2) as client:
            metrics = client.ask("GET", "/metrics").body.decode()
            dropped = re.search(r"^xaiproxy_log_lines_dropped_total (\d+)", metrics, re.M)
            assert int(dropped[1]) > 100
            warning = json.loads(client.ask("GET", "/readyz").body)["warning"]
        assert warning == "log lines were dropped, because the log is not read in time"
        # Events that were sent before.
        while not streaming.silent():
            streaming.chunk()
        assert streaming.chunk().startswith(b"data: ")
        supervised.read_on()
        supervised.wait_for_line(r"\d{3,} log lines were dropped")  # which needs no further line


def ask_for_nothing(client):
    """Send a hundred requests that need no upstream."""
    client.send(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
    assert {client.message().status for _ in range(100)} == {404}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def wait_for_models(port, seconds=30):
    """Wait until a proxy serves on `port`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with Client(port) as client:
                assert client.ask("GET", "/v1/models").status == 200
                return
        except (OSError, AssertionError):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize("pipe", [os.pipe, os.openpty])
def test_programs_are_restarted_and_signals_obeyed_without_a_reader(tmp_path, sandbox, pipe):
    """With a full stdout, and with one whose reader is closed: EPIPE, and EIO of a terminal."""
    port = free_port()
    conf = edited_conf(tmp_path, startsecs=0)
    with Supervised(
        tmp_path, sandbox, pipe=pipe, conf=conf, XAI_PROXY_PORT=str(port)
    ) as supervised:
        wait_for_models(port)
        supervised.stop_reading()
        with Client(port) as client:
            for _ in range(15):
                ask_for_nothing(client)
        os.kill(supervised.pids()["proxy"], signal.SIGKILL)
        wait_for_models(port)
        supervised.close_output()
        supervised.read_on()
        with Client(port) as client:
            ask_for_nothing(client)
        children = (
            Path(f"/proc/{supervised.process.pid}/task/{supervised.process.pid}/children")
            .read_text()
            .split()
        )
        os.kill(int(children[-1]), signal.SIGKILL)
        wait_for_models(port)
        supervised.signal(signal.SIGTERM)
        assert supervised.process.wait(30) == 0


def test_a_stdout_that_is_a_file_gets_every_line(tmp_path, sandbox):
    """A file that is not opened for appending: two descriptors would overwrite each other's lines."""
    log = tmp_path / "log"

    def file():
        end, writer = os.pipe()
        os.close(writer)
        return end, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    script = quick_to_stop("echo up")
    conf = stand_ins(tmp_path, refresher=script, proxy=script)
    with Supervised(tmp_path, sandbox, pipe=file, conf=conf) as supervised:
        wait_until(lambda: log.read_text().count('"up"') == 2)
        supervised.signal(signal.SIGTERM)
        assert supervised.process.wait(30) == 0
    messages = [json.loads(line)["message"] for line in log.read_text().splitlines()]
    for name in ("proxy", "refresher"):
        assert {f"spawned: '{name}'", f"stopped: {name}"} <= {
            re.sub(r" (with|\().*", "", message) for message in messages
        }
    assert messages.count("up") == messages.count("got SIGTERM") == 2

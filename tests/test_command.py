"""The end of every command: one sentence on stderr and an exit code."""

import os
import resource
import select
import signal
import subprocess
import sys
import time

import pytest
from checkout import ROOT
from proxy_process import COMMAND, PYTHON, environment
from supervised import BIN
from terminal import Terminal

from xaiproxy import command, errors

COMMANDS = {
    name: [*PYTHON, "-c", f"import sys; from xaiproxy.{module} import main; sys.exit(main())"]
    for name, module in [
        ("login", "login.command"),
        ("refresher", "refresher.command"),
        ("key", "client_key_command"),
    ]
}
COMMANDS["proxy"] = COMMAND
COMMAND_NAMES = sorted(path.name for path in (ROOT / "bin").glob("xai-*"))


@pytest.mark.parametrize(
    "error, status",
    [
        (errors.ConfigurationError("a"), 78),
        (errors.LoginUnusable("missing", "a"), 77),
        (errors.IssuerUnavailable("a"), 69),
        (errors.GrantRefused("a"), 77),
        (errors.NotEntitled("a"), 77),
        (errors.StorageError("a"), 75),
        (errors.LockBusy("a"), 75),
        (errors.Error("a"), 75),
    ],
)
def test_an_error_is_one_sentence_and_its_exit_code(error, status, capsys):
    def body():
        raise error

    assert command.run("xai-test", body) == status
    assert capsys.readouterr() == ("", "xai-test: a\n")


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (77, 77)])
def test_without_an_error_the_code_of_the_body_is_the_exit_code(returned, status, capsys):
    assert command.run("xai-test", lambda: returned) == status
    assert capsys.readouterr() == ("", "")


def test_an_exception_of_our_own_is_not_caught():
    with pytest.raises(ZeroDivisionError):
        command.run("xai-test", lambda: 1 / 0)


def test_an_interrupt_ends_with_130():
    # A signal that comes just before a sleep begins does not end it.
    code = (
        "import sys, time; from xaiproxy import command\n"
        "def main():\n"
        "    print('up', flush=True)\n"
        "    for _ in range(600): time.sleep(0.1)\n"
        "sys.exit(command.run('xai-test', main))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=10)[1], process.returncode) == (
        "\nxai-test: interrupted\n",
        130,
    )


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_an_interrupt_while_a_command_is_imported_ends_with_130(tmp_path, name):
    """Of what a command imports, argparse, which all import, never ends here."""
    # Not time.sleep: that of gevent waits in the event loop, which prints the interrupt.
    (tmp_path / "argparse.py").write_text("import signal; print('up', flush=True); signal.pause()")
    process = subprocess.Popen(
        [BIN / name],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=10)[1], process.returncode) == (
        f"\n{name}: interrupted\n",
        130,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nonsense"], "xai-test: unrecognized arguments: --nonsense; see xai-test --help\n"),
        # An abbreviated option is not accepted.
        (
            ["--tok", "x"],
            "xai-test: unrecognized arguments: --tok x; see xai-test --help\n",
        ),
        (
            ["--token-path"],
            "xai-test: argument --token-path: expected one argument; see xai-test --help\n",
        ),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_64(arguments, message, capsys):
    parser = command.ArgumentParser("", prog="xai-test")
    parser.add_argument("--token-path")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    assert (caught.value.code, capsys.readouterr().err) == (64, message)


def test_help_begins_with_examples_as_they_are_written(capsys):
    with pytest.raises(SystemExit) as caught:
        command.ArgumentParser("  one\n     two\n", prog="xai-test").parse_args(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("  one\n     two\n\nusage: xai-test ")


def crash(folder, code: str) -> bool:
    """Whether a process dumps its core, if it may, when it crashes in `body` after `code`."""
    code += (
        "\nbody = lambda: os.kill(os.getpid(), signal.SIGSEGV)"
        "\ncommand.run('xai-test', body) if guarded else body()"
    )
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (hard, hard)),
    )
    status = os.waitpid(process.pid, 0)[1]
    process.returncode = status
    assert os.WTERMSIG(status) == signal.SIGSEGV
    return os.WCOREDUMP(status)


def test_a_crash_leaves_no_core(tmp_path):
    imports = "import os, signal; from xaiproxy import command; guarded = "
    if not crash(tmp_path, imports + "False"):
        pytest.skip("no process dumps its core here")
    assert not crash(tmp_path, imports + "True")


def run(folder, name, *arguments, script='exec "$@"', environ=None, **settings):
    """The result of a command that `script` starts."""
    return subprocess.run(
        ["sh", "-c", script, "sh", *COMMANDS[name], *arguments],
        cwd=folder,
        text=True,
        env=environment(
            folder, environ, token_path=folder / "new" / "login" / "tokens.json", **settings
        ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
    )


NO_LOGIN = "Not signed in: "


@pytest.mark.parametrize(
    "arguments, status, printed",
    [
        (["login", "--status"], 77, NO_LOGIN),
        (["refresher", "--once"], 77, ""),
        (["key", "add", "me"], 0, "xaip_"),
        (["proxy", "--version"], 0, "0."),
        (["proxy", "--port", "x"], 78, ""),
    ],
)
def test_closed_standard_streams_change_only_what_cannot_be_printed(
    tmp_path, arguments, status, printed
):
    closed_stdout = run(tmp_path, *arguments, script='exec "$@" >&-')
    assert "Traceback" not in closed_stdout.stderr and "Exception" not in closed_stdout.stderr
    assert closed_stdout.returncode == (75 if printed else status)
    done = "nothing was changed, since" if "add" in arguments else "it is done, but"
    assert not printed or f"{done} the result cannot be printed" in closed_stdout.stderr
    if "add" in arguments:
        assert run(tmp_path, "key", "list").stdout == ""
    others = run(tmp_path, *arguments, script='exec "$@" <&- 2>&-')
    assert (others.returncode, others.stderr) == (status, "") and printed in others.stdout
    folder = tmp_path / "new" / "login"
    locks = [path for path in folder.iterdir() if path.suffix == ".lock"] if folder.exists() else []
    assert [path.read_bytes() for path in locks] == [b""] * len(locks)


@pytest.mark.parametrize(
    "unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"]
)
def test_a_result_that_cannot_be_printed_is_an_error(tmp_path, unbuffered):
    def failure(*arguments, script='exec "$@" >/dev/full'):
        done = run(tmp_path, *arguments, script=script, environ=unbuffered)
        sentence = done.stderr.splitlines()[-1]
        return done.returncode, sentence.partition(": ")[2], "Traceback" in done.stderr

    full = "the result cannot be printed: No space left on device"
    assert failure("login", "--logout") == (75, f"it is done, but {full}", False)
    assert failure("proxy", "--version") == (75, f"it is done, but {full}", False)
    assert failure("key", "add", "me") == (75, f"nothing was changed, since {full}", False)
    keys = tmp_path / "new" / "login" / "client-keys"
    assert not keys.exists()
    keys.write_text("".join(f"client-{number} {number:064x}\n" for number in range(3000)))
    assert failure(
        "key", "list", script='mkfifo fifo; exec 3<>fifo 4>fifo 3<&-; exec "$@" >&4'
    ) == (75, "it is done, but the result cannot be printed: Broken pipe", False)
    assert failure("key", "list", script='ulimit -f 8; exec "$@" >list') == (
        75,
        "it is done, but the result cannot be printed: File too large",
        False,
    )


@pytest.mark.parametrize(
    "where", ["2>/dev/full", "2>&4", "2>&5"], ids=["full disk", "reader gone", "unread and full"]
)
def test_the_exit_code_is_right_even_if_no_sentence_can_be_printed(tmp_path, where):
    """Descriptor 4 is a pipe without a reader, 5 one that is full."""
    script = (
        "mkfifo gone full; exec 3<>gone 4>gone 3<&-; exec 5<>full; head -c 65536 /dev/zero >&5; "
        f'exec "$@" {where}'
    )
    cases = [
        (["proxy", "--port", "x"], 78),
        (["key", "add", "me"], 0),
        (["login", "--status"], 77),
        (["login", "--nonsense"], 64),
        (["refresher", "--token-path", "/"], 78),
    ]
    # With a full pipe, each takes a second.
    for arguments, status in cases[:2] if "5" in where else cases[2 * ("4" in where) :]:
        done = run(tmp_path, *arguments, script=f"rm -f gone full; {script}")
        assert (arguments, done.returncode) == (arguments, status)
        assert status or done.stdout.startswith("xaip_")


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["login", "--status"], 77),
        (["refresher", "--once"], 77),
        (["key", "list"], 0),
        (["proxy", "--bind", "x"], 78),
    ],
)
def test_absolute_paths_work_in_a_deleted_working_directory(tmp_path, arguments, status):
    done = run(tmp_path, *arguments, script='mkdir gone; cd gone; rmdir ../gone; exec "$@"')
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr


def test_a_relative_path_needs_the_working_directory(tmp_path):
    done = run(
        tmp_path,
        "refresher",
        "--once",
        script='mkdir gone; cd gone; rmdir ../gone; exec "$@" --token-path t',
    )
    assert (done.returncode, done.stderr) == (
        78,
        "xai-refresher: XAI_PROXY_TOKEN_PATH must be an absolute path, as the working directory "
        "was deleted, not 't'\n",
    )


@pytest.mark.parametrize("arguments", [["refresher", "--once"], ["key", "add", "me"]])
def test_no_folder_is_writable_for_others_with_any_umask(tmp_path, arguments):
    run(tmp_path, *arguments, script='umask 0; exec "$@"')
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("new", "new/login")]
    assert modes == [0o755, 0o700]


def test_a_closed_terminal_ends_a_program_unless_nohup_started_it(tmp_path):
    """The proxy in the foreground ends; a refresher with nohup(1) retries at the SIGHUP."""
    script = (
        f'nohup "$@" --token-path {tmp_path}/login/tokens.json 2>log & '
        f"echo $! >pid; exec {' '.join(COMMAND)}"
    )
    command = ["sh", "-c", script, "sh", *COMMANDS["refresher"]]
    with Terminal(command, cwd=tmp_path, env=environment(tmp_path)) as terminal:
        terminal.expect("listening on", 20)
        log = tmp_path / "log"
        while "not signed in" not in log.read_text():
            time.sleep(0.05)
        terminal.close()
        assert terminal.process.wait(10) == 0
        pid = int((tmp_path / "pid").read_text())
        end = os.pidfd_open(pid)
        assert not select.select([end], [], [], 0.5)[0]
        os.kill(pid, signal.SIGTERM)
        assert select.select([end], [], [], 10)[0]
        os.close(end)
        assert '"ended"' in log.read_text()

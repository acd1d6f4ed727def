"""How every command ends: one sentence on stderr and an exit code."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from xaiproxy import command, errors


@pytest.mark.parametrize("error, status", [
    (errors.ConfigurationError("a"), 78), (errors.LoginUnusable("missing", "a"), 77), (errors.IssuerUnavailable("a"), 69),
    (errors.GrantRefused("a"), 77), (errors.NotEntitled("a"), 77), (errors.StorageError("a"), 75), (errors.LockBusy("a"), 75),
    (errors.Error("a"), 75)])
def test_an_error_is_one_sentence_and_its_exit_code(error, status, capsys):
    def body():
        raise error
    assert command.run("xai-test", body) == status
    assert capsys.readouterr() == ("", "xai-test: a\n")


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (77, 77)])
def test_without_an_error_the_bodys_own_code_counts(returned, status, capsys):
    assert command.run("xai-test", lambda: returned) == status
    assert capsys.readouterr() == ("", "")


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        command.run("xai-test", lambda: 1 / 0)


def test_an_interrupt_ends_with_130():
    code = ("import sys, time; from xaiproxy import command\n"
            "sys.exit(command.run('xai-test', lambda: (print('up', flush=True), time.sleep(60))))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=10)[1], process.returncode) == ("\nxai-test: interrupted\n", 130)


@pytest.mark.parametrize("arguments, said", [
    (["--nonsense"], "xai-test: unrecognized arguments: --nonsense; see xai-test --help\n"),
    (["--tok", "x"], "xai-test: unrecognized arguments: --tok x; see xai-test --help\n"),  # abbreviations are no promise
    (["--token-path"], "xai-test: argument --token-path: expected one argument; see xai-test --help\n")])
def test_a_wrong_command_line_is_one_sentence_and_64(arguments, said, capsys):
    parser = command.ArgumentParser(prog="xai-test")
    parser.add_argument("--token-path")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    assert (caught.value.code, capsys.readouterr().err) == (64, said)


def test_help_keeps_worked_examples_as_they_are_written(capsys):
    with pytest.raises(SystemExit) as caught:
        command.ArgumentParser(prog="xai-test", description="  one\n     two\n").parse_args(["--help"])
    assert caught.value.code == 0 and "  one\n     two\n" in capsys.readouterr().out


def crash(folder, code: str) -> bool:
    """Whether a process with leave to do so dumps its core when it crashes in `body`, with `code` before."""
    code += "\nbody = lambda: os.kill(os.getpid(), signal.SIGSEGV)\ncommand.run('xai-test', body) if guarded else body()"
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder,
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (hard, hard)))
    status = os.waitpid(process.pid, 0)[1]
    process.returncode = status
    assert os.WTERMSIG(status) == signal.SIGSEGV
    return os.WCOREDUMP(status)


def test_a_crash_leaves_no_core(tmp_path):
    imports = "import os, signal; from xaiproxy import command; guarded = "
    if not crash(tmp_path, imports + "False"):
        pytest.skip("no process dumps its core here")
    assert not crash(tmp_path, imports + "True")

"""xai-launch: real processes, with programs in place of the clients that report what they get."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import ONE_CA, ROOT
from forked_process import run_python
from proxy_process import ProxyProcess
from sandbox import Sandbox
from terminal import CTRL_C, Terminal

from xaiproxy import client_keys, client_recipes

COMMAND = [sys.executable, "-W", "error", "-m", "xaiproxy.launch_command"]
RECIPES = client_recipes.load()
KEY = "xaip_of-the-laptop"
# In place of a client: it prints its arguments, its environment, and the files that they name.
CLIENT = f"""#!{sys.executable} -S
import glob, json, os, re, signal, sys
if sys.argv[1:] == ["logs", "path"]:
    sys.exit(print(os.environ["HOME"] + "/.config/llm/logs.db"))
if "wait" in sys.argv:
    def count(number, frame):
        os.write(1, signal.Signals(number).name.encode() + b"\\n")
        if number == signal.SIGTERM:
            os._exit(7)
    signal.signal(signal.SIGINT, count)
    signal.signal(signal.SIGTERM, count)
    os.write(1, b"started\\n")
    while sys.stdin.read(1):
        pass
given = [*sys.argv[1:], *os.environ.values()]
folders = {{found[0] for text in given if (found := re.search("/[^ \\"]*/xai-launch-[^/ \\"]+", text))}}
files = {{path: open(path).read() for folder in folders for path in glob.glob(folder + "/*") if os.path.isfile(path)}}
umask = os.umask(0)
print(json.dumps([sys.argv[1:], dict(os.environ), files, umask]))
sys.exit(3 if "fail" in sys.argv else 0)
"""
# Where each client has settings of its own.
OWN_FILES = (
    ".claude/settings.json",
    ".codex/config.toml",
    ".config/opencode/opencode.json",
    ".pi/agent/models.json",
    ".qwen/settings.json",
    ".grok/config.toml",
    ".grok/auth.json",
    ".aider.conf.yml",
    ".cline/data/settings/providers.json",
    ".continue/config.yaml",
    ".hermes/config.yaml",
    ".config/gptme/config.toml",
    ".config/llm/extra-openai-models.yaml",
    ".config/llm/keys.json",
    ".config/shell_gpt/.sgptrc",
)


class Home:
    """A home with settings of every client, and the clients on PATH, before a proxy."""

    def __init__(self, folder: Path, proxy: ProxyProcess, sandbox: Sandbox):
        self.path, self.keys = folder / "home", proxy.token_path.with_name("client-keys")
        for name in OWN_FILES:
            file = self.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("API_BASE_URL=the user's own\n")
        programs = folder / "bin"
        programs.mkdir()
        for client, recipe in RECIPES.items():
            program = programs / (recipe.command or client)
            program.write_text(CLIENT)
            program.chmod(0o755)
        (folder / "tmp").mkdir()
        self.temporary = folder / "tmp"
        self.environ = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(self.path),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "SSL_CERT_FILE": str(ONE_CA),
            **sandbox.env,
            "XAI_PROXY_PORT": str(proxy.port),
            "XAI_PROXY_TOKEN_PATH": str(proxy.token_path),
        }

    def hashes(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.path)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.path.rglob("*")
            if path.is_file()
        }

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            env={**self.environ, **environ},
            cwd=self.path,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str, **environ: str) -> tuple[int, str, str]:
        ended = run_python(
            "xaiproxy.launch_command",
            [*COMMAND[-2:], *arguments],
            cwd=self.path,
            environ=self.environ | environ,
            timeout=60,
        )
        return ended.returncode, ended.stdout, ended.stderr

    def launch(self, *arguments: str, status: int = 0, **environ: str) -> Any:
        """What the client reports: its arguments, environment, files and umask."""
        before = self.hashes()
        code, out, err = self.run(*arguments, **environ)
        assert (code, err) == (status, "")
        assert self.hashes() == before and not list(self.temporary.iterdir())
        return json.loads(out)

    def refusal(self, *arguments: str, status: int, **environ: str) -> str:
        code, out, err = self.run(*arguments, **environ)
        assert (code, out, err.count("\n")) == (status, "", 1), err
        return err.removeprefix("xai-launch: ").strip()


@pytest.fixture
def home(tmp_path: Path, endpoint: ProxyProcess, sandbox: Sandbox) -> Home:
    return Home(tmp_path, endpoint, sandbox)


@pytest.fixture(scope="module")
def keyed_proxy(
    shared_sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProxyProcess]:
    folder, origin = tmp_path_factory.mktemp("keyed"), shared_sandbox.url
    (folder / "client-keys").write_text(f"laptop {client_keys.digest(KEY)}\n")
    shared_sandbox.write_login(folder / "tokens.json")
    with ProxyProcess(folder, issuer=origin, upstream=origin) as proxy:
        yield proxy


@pytest.fixture
def keyed(tmp_path: Path, keyed_proxy: ProxyProcess, sandbox: Sandbox) -> Iterator[Home]:
    home = Home(tmp_path, keyed_proxy, sandbox)
    yield home
    assert list(client_keys.load(home.keys)) == ["laptop"]


@pytest.mark.parametrize("client", RECIPES)
def test_a_client_gets_the_address_and_a_key_and_its_own_files_stay(
    keyed: Home, endpoint: ProxyProcess, client: str
) -> None:
    arguments, environ, files, _ = keyed.launch(client, "--version", "a  'word'")
    assert arguments[-2:] == ["--version", "a  'word'"]
    given = json.dumps([arguments, environ, files])
    assert f"http://127.0.0.1:{keyed.environ['XAI_PROXY_PORT']}" in given
    assert "grok-4.5" in given and ":9090" not in given
    assert environ["XAIPROXY_KEY"].startswith("xaip_")
    # ps(1) shows arguments to all users.
    assert not any("xaip_" in argument for argument in arguments)


def test_a_key_lasts_as_long_as_the_client(keyed: Home) -> None:
    with keyed.start("codex", "wait") as process:
        assert process.stdout.readline() == "started\n"
        name = f"launch-codex-{process.pid}"
        assert list(client_keys.load(keyed.keys)) == ["laptop", name]
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_the_users_own_key_is_used_and_none_is_made(keyed: Home) -> None:
    keyed.keys.with_name("client-keys.lock").unlink(missing_ok=True)
    assert keyed.launch("claude", XAIPROXY_KEY=KEY)[1]["ANTHROPIC_AUTH_TOKEN"] == KEY
    assert not keyed.keys.with_name("client-keys.lock").exists()


def test_no_key_is_made_where_none_is_required(home: Home) -> None:
    assert home.launch("qwen")[1]["OPENAI_API_KEY"] == "none"
    assert not home.keys.exists()


def test_settings_of_claude_codes_own_do_not_override_the_environment(home: Home) -> None:
    arguments, environ, files, _ = home.launch("claude", ANTHROPIC_API_KEY="left-over")
    [path] = [path for path in files if path.endswith("/settings.json")]
    settings = json.loads(files[path])["env"]
    assert arguments == ["--settings", path] and "ANTHROPIC_API_KEY" not in environ
    assert settings.pop("ANTHROPIC_API_KEY") == ""
    assert settings == {name: environ[name] for name in environ if name.startswith("ANTHROPIC_")}


def test_codex_gets_every_line_of_its_file_as_an_option(home: Home) -> None:
    arguments = home.launch("codex", "exec", "hello")[0]
    origin = f"http://127.0.0.1:{home.environ['XAI_PROXY_PORT']}"
    lines = RECIPES["codex"].texts(origin)["codex.toml"].splitlines()
    options = [word for line in reversed(lines) if line[0] != "#" for word in ("-c", line)]
    assert arguments == [*options, "exec", "hello"]


@pytest.mark.parametrize(
    "client, replaced, linked",
    [("grok", "config.toml", "auth.json"), ("llm", "extra-openai-models.yaml", "keys.json")],
)
def test_a_folder_aside_has_links_to_the_rest(
    home: Home, client: str, replaced: str, linked: str
) -> None:
    files = {Path(path).name: text for path, text in home.launch(client)[2].items()}
    assert "grok-4.5" in files[replaced] and "the user's own" in files[linked]


def test_the_clients_status_is_passed_on(home: Home) -> None:
    home.launch("pi", "fail", status=3)


def test_the_client_has_the_users_umask(home: Home) -> None:
    # A command of ours has 022 at least.
    done = subprocess.run(
        [*COMMAND, "pi"], env=home.environ, umask=0o002, stdout=subprocess.PIPE, timeout=60
    )
    assert json.loads(done.stdout)[3] == 0o002


def test_loopback_is_reached_without_the_users_http_proxy(home: Home) -> None:
    environ = home.launch("pi", HTTPS_PROXY="http://127.0.0.1:1", NO_PROXY="example.com")[1]
    assert environ["NO_PROXY"] == environ["no_proxy"] == "example.com,127.0.0.1,localhost,::1"
    assert "NO_PROXY" not in home.launch("pi")[1]


def test_ctrl_c_reaches_the_client_once_and_a_sigterm_is_passed_on(keyed: Home) -> None:
    with Terminal([*COMMAND, "claude", "wait"], env=keyed.environ) as terminal:
        terminal.expect("started", 30)
        terminal.type(CTRL_C)
        terminal.expect("SIGINT", 30)
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end(30) == 7
    assert re.findall("SIG[A-Z]+", terminal.screen) == ["SIGINT", "SIGTERM"]


def test_a_sigint_from_a_program_is_passed_on(keyed: Home) -> None:
    with keyed.start("claude", "wait") as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        process.send_signal(signal.SIGTERM)
        # Before communicate, which closes the client's input and thereby ends it as well.
        assert process.stdout.readline() == "SIGTERM\n"
        assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 7


def test_a_client_that_a_signal_ends_has_the_status_of_a_shell(home: Home) -> None:
    with home.start("claude", "wait") as process:
        assert process.stdout.readline() == "started\n"
        [client] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(client), signal.SIGKILL)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL


def test_the_key_of_a_killed_one_is_removed_by_the_next(keyed: Home) -> None:
    with keyed.start("claude", "wait") as alive, keyed.start("claude", "wait") as killed:
        for process in (alive, killed):
            assert process.stdout.readline() == "started\n"
        killed.kill()
        # The client itself ends with its input.
        killed.communicate(timeout=30)
        assert f"launch-claude-{killed.pid}" in client_keys.load(keyed.keys)
        assert keyed.run("codex")[0] == 0
        assert list(client_keys.load(keyed.keys)) == ["laptop", f"launch-claude-{alive.pid}"]
        alive.communicate(timeout=30)
    for folder in keyed.temporary.iterdir():
        shutil.rmtree(folder)


def test_a_key_file_that_cannot_be_changed_is_named(keyed: Home, tmp_path: Path) -> None:
    link = tmp_path / "mounted"
    link.symlink_to(keyed.keys)
    sentence = keyed.refusal("codex", status=78, XAI_PROXY_CLIENT_KEYS_FILE=str(link))
    assert sentence.startswith("the proxy requires a client key, and none can be made: ")
    assert str(link) in sentence and sentence.endswith("or set XAIPROXY_KEY to a key")
    assert not list(keyed.temporary.iterdir())


def test_llm_itself_gets_an_answer_with_a_key_for_the_run(keyed: Home) -> None:
    programs = Path(sys.executable).parent
    if not (programs / "llm").exists():
        pytest.skip("llm is not installed")
    code, out, err = keyed.run("llm", "hello", PATH=f"{programs}:{os.environ['PATH']}")
    assert (code, err) == (0, "") and out.startswith("This is the sandbox, not xAI")


def test_an_unknown_client_gets_the_list(home: Home) -> None:
    known = ", ".join(RECIPES)
    assert home.refusal("cursor", status=64) == f"unknown client 'cursor'; known: {known}"


@pytest.mark.parametrize("arguments", [[], ["--list", "codex"], ["--print"]])
def test_wrong_usage_is_64(home: Home, arguments: list[str]) -> None:
    assert "give the name of a client, or --list;" in home.refusal(*arguments, status=64)


def test_a_client_that_is_not_installed_is_named_with_its_installation(home: Home) -> None:
    assert (
        home.refusal("codex", status=127, PATH=os.path.dirname(sys.executable))
        == "codex is not on PATH; to install Codex: npm install -g @openai/codex"
    )


def test_a_proxy_that_does_not_run_is_named_with_how_to_start_it(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert (
        home.refusal("codex", status=69, XAI_PROXY_PORT=port)
        == f"nothing is listening on http://127.0.0.1:{port}; start the proxy with "
        f"`{ROOT}/bin/xai-serve`"
    )


def test_the_sandbox_is_another_program(home: Home, sandbox: Sandbox) -> None:
    sentence = home.refusal("codex", status=69, XAI_PROXY_PORT=str(sandbox.port))
    assert sentence.startswith(f"another program listens on http://127.0.0.1:{sandbox.port};")


def test_port_0_is_refused(home: Home) -> None:
    assert "XAI_PROXY_PORT is 0" in home.refusal("codex", status=78, XAI_PROXY_PORT="0")


def test_signing_in_is_named_when_there_is_no_login(home: Home, endpoint: ProxyProcess) -> None:
    endpoint.token_path.unlink()
    assert (
        home.refusal("codex", status=77) == "the proxy has no login that it can use; run "
        f"`{ROOT}/bin/xai-login --device` to sign in"
    )


def test_the_list_has_every_client_and_whether_it_is_installed(home: Home, tmp_path: Path) -> None:
    (tmp_path / "bin" / "codex").unlink()
    code, out, err = home.run("--list", PATH=str(tmp_path / "bin"))
    assert (code, err) == (0, "")
    header, *lines = (re.split("  +", line, maxsplit=2) for line in out.splitlines())
    assert header == ["CLIENT", "STATE", "WHAT IS SET FOR IT"]
    states = {client: state for client, state, _text in lines}
    assert list(states) == list(RECIPES)
    assert states.pop("codex") == "not installed" and set(states.values()) == {"installed"}


def test_the_list_fits_the_terminal(home: Home) -> None:
    with Terminal([*COMMAND, "--list"], columns=60, cwd=home.path, env=home.environ) as terminal:
        assert terminal.end() == 0
    lines = terminal.screen.splitlines()
    assert max(map(len, lines)) < 60 and len(lines) > len(RECIPES) + 1
    words = [text for line in lines for text in line.split()]
    assert [
        text for recipe in RECIPES.values() for text in recipe.sets.split() if text not in words
    ] == []


@pytest.mark.parametrize("client", RECIPES)
def test_what_is_printed_is_a_script_that_sets_the_same(home: Home, client: str) -> None:
    code, out, err = home.run("--print", client)
    assert (code, err) == (0, "")
    done = subprocess.run(
        ["sh", "-eu", "-c", out, "sh", "hello"], env=home.environ, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    launched = home.run(client, "hello")[1]
    made = re.compile(rf'{home.temporary}/[^/ \\"]+')
    reports = [json.loads(made.sub("FOLDER", text)) for text in (done.stdout, launched)]
    for _, environ, *_ in reports:
        for name in ("_", "SHLVL", "PWD", "OLDPWD"):
            environ.pop(name, None)
    assert reports[0][:2] == reports[1][:2]


def test_what_is_printed_names_no_key(keyed: Home) -> None:
    for environ in ({}, {"XAIPROXY_KEY": KEY}):
        code, out, _ = keyed.run("--print", "claude", **environ)
        assert code == 0 and "xaip_" not in out and "xai-client-key add NAME" in out
    done = subprocess.run(["sh", "-c", out], env=keyed.environ, capture_output=True, text=True)
    assert done.returncode and "the proxy requires a client key" in done.stderr

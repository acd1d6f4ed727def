"""The pages: what they name exists, and the README's first session is run as it is typed."""

from __future__ import annotations

import configparser
import functools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import ONE_CA, ROOT
from sandbox import Sandbox
from supervised import BIN
from terminal import CTRL_C, Terminal

from xaiproxy import config, errors

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("conf/**/*.md")]
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# Programs of other projects, and commands of the shell.
OTHERS = {
    "cp",
    "curl",
    "docker",
    "echo",
    "export",
    "install",
    "kubectl",
    "pip",
    "pipx",
    "prometheus",
    "rm",
    "uv",
}


def commands() -> set[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return set(re.findall(r"^(\S+) =", setup["options.entry_points"]["console_scripts"], re.M))


def blocks(page: str, *languages: str) -> list[str]:
    return [text for name, text in BLOCK.findall((ROOT / page).read_text()) if name in languages]


def typed(block: str, prompt: str = "") -> list[str]:
    """The lines of a block that are typed, without the prompt and the ends of lines in them."""
    lines = block.replace("\\\n", "").splitlines()
    return [line.removeprefix(prompt) for line in lines if line.startswith(prompt) and line.strip()]


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command in a line of shell, without variables that are set for it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            found.append([])
        elif found[-1] or not re.match(r"\w+=", word):
            found[-1].append(word)
    return [words for words in found if words]


@functools.cache
def usage(command: str) -> str:
    done = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, timeout=30)
    return done.stdout


def check(words: list[str]) -> None:
    """Assert that the command exists, and has the options that it is typed with."""
    name = words[0].removeprefix("bin/")
    if name not in commands():
        assert words[0] in OTHERS or (ROOT / words[0]).exists(), words
        return
    assert (ROOT / "bin" / name).exists()
    for word in words[1:]:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", usage(name)), words


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    text = BLOCK.sub("", (ROOT / page).read_text())
    for path, fragment in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if fragment:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", target.read_text()), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert fragment in anchors, (path, fragment)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_of_a_page_exists(page: str) -> None:
    lines = [line for block in blocks(page, "sh") for line in typed(block)]
    lines += [line for block in blocks(page, "console") for line in typed(block, "$ ")]
    for line in lines:
        for words in simple_commands(line):
            check(words)
    prose = BLOCK.sub("", (ROOT / page).read_text())
    for code in re.findall(r"`((?:bin/)?(?:xai-)[a-z-]+[^`]*)`", prose):
        check(code.replace("…", "").split())


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_every_setting_of_a_page_exists(page: str) -> None:
    named = set(re.findall(r"\bXAI_PROXY_[A-Z_]*[A-Z]", (ROOT / page).read_text()))
    assert named <= set(config.SETTINGS)


def test_the_table_of_errors_has_every_code_and_status() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    rows = re.findall(r"^\| ([\d, ]+) \| ([a-z_`, ]+) \|", text, re.M)
    kinds = [errors.ErrorResponse]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {code for _, codes in rows for code in re.findall(r"\w+", codes)} == {
        kind.code for kind in kinds
    }
    assert {int(status) for statuses, _ in rows for status in statuses.split(", ")} == {
        kind.status for kind in kinds
    }


def test_the_table_of_alerts_has_every_alert() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    rules = (ROOT / "conf" / "prometheus" / "rules.yml").read_text()
    alerts = re.findall(r"alert: (\w+)", rules)
    assert re.findall(r"^\| (Xaiproxy\w+) \|", text, re.M) == alerts


def pattern(shown: str) -> str:
    """A regular expression for a line of output, in which "..." stands for anything."""
    return ".*".join(re.escape(part) for part in re.split(r" ?\.\.\.", shown))


@pytest.mark.skipif(not shutil.which("curl"), reason="the README's requests need curl")
def test_the_first_session_of_the_readme(tmp_path: Path) -> None:
    block = blocks("README.md", "console")[0]
    sign_in, serve, *requests = typed(block, "$ ")
    # The line of output after each command but the first two.
    outputs = [part.split("\n")[1] for part in block.replace("\\\n", "").split("$ ")[3:]]
    assert len(requests) == len(outputs) == 3
    [ready] = re.findall(r"proxy: ready: .*", block)
    with Sandbox("--auto-approve", "0", "--device-interval", "1") as sandbox:
        environ = {
            **{name: os.environ[name] for name in ("PATH", "LOWEST") if name in os.environ},
            "HOME": str(tmp_path),
            "SSL_CERT_FILE": str(ONE_CA),
            "XAI_PROXY_PORT": "0",
            **sandbox.env,
        }
        with Terminal(["sh", "-c", sign_in], cwd=ROOT, env=environ) as terminal:
            terminal.expect("Signed in as .*\r\nNext: .* with `bin/xai-serve`", 30)
            assert terminal.end() == 0
        with Terminal(["sh", "-c", f"exec {serve}"], cwd=ROOT, env=environ) as terminal:
            here = re.escape(ready).replace("9090", r"(\d+)")
            address = f"127.0.0.1:{terminal.expect(here, 30)[1]}"

            def output(command: str) -> str:
                command = command.replace("127.0.0.1:9090", address)
                run = subprocess.run(
                    ["sh", "-c", command], capture_output=True, text=True, timeout=30
                )
                assert run.returncode == 0, run.stderr
                return run.stdout

            for command, shown in zip(requests, outputs, strict=True):
                assert re.match(pattern(shown), output(command)), command
            streams = typed(blocks("docs/clients.md", "sh")[0])
            assert len(streams) == 2
            for command in streams:
                assert output(command).startswith("data: ")
            terminal.type(CTRL_C)
            assert terminal.end(20) == 0

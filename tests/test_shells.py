"""Shells complete the commands, and man(1) shows them, by the files of conf/share."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, SUPPORT
from terminal import Terminal

SHARE = ROOT / "conf" / "share"
BASH_COMPLETION = Path("/usr/share/bash-completion/bash_completion")
# Each shell, and what has it find completions; fish, like bash-completion, uses XDG_DATA_DIRS.
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], f"source {BASH_COMPLETION}"),
    "zsh": (
        ["zsh", "-f", "-i"],
        f"fpath=({SHARE}/zsh/site-functions $fpath); autoload -Uz compinit; compinit -D -u",
    ),
    "fish": (["fish", "--private", "-i"], "true"),
}
COMPLETED = {
    "xai-login --d": ["--device", "--doctor"],
    "xai-launch cod": ["codex"],
    "xai-client-key ": ["add", "list", "remove"],
    # A file, and a key.
    "xai-login --token-path my-": ["my-tokens"],
    "xai-client-key remove lap": ["laptop"],
}
KILL_LINE = "\x15"
ESCAPES = r"(?:\x1b\[[\d;?]*[A-Za-z]|\x1b\(B|\x0f)*"
PAGES = sorted((SHARE / "man" / "man1").iterdir())


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_files_are_made_from_the_parsers(tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    command = [sys.executable, SUPPORT / "generated_files.py", tmp_path]
    subprocess.run(command, check=True, timeout=60)
    made = files(tmp_path / "conf" / "share")
    assert files(SHARE) == made, "bin/generate writes them anew"
    example = "conf/xaiproxy.env.example"
    assert (ROOT / example).read_text() == (tmp_path / example).read_text()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_the_commands(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell) or (shell == "bash" and not BASH_COMPLETION.exists()):
        pytest.skip(f"{shell} and its completions are required")
    words, set_up = SHELLS[shell]
    (tmp_path / "my-tokens").touch()
    (tmp_path / ".xai-proxy").mkdir(mode=0o700)
    (tmp_path / ".xai-proxy" / "client-keys").write_text(f"laptop {'0' * 64}\n")
    environ = {
        "PATH": f"{ROOT / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "XDG_DATA_DIRS": f"{SHARE}:/usr/local/share:/usr/share",
        "TERM": "xterm",
    }
    with Terminal(words, env=environ, cwd=tmp_path) as terminal:
        terminal.type(f"{set_up}; echo re''ady\n")
        terminal.expect("ready", 30)
        for typed, completed in COMPLETED.items():
            terminal.type(f"{typed}\t\t")
            for word in completed:
                terminal.expect(ESCAPES.join(map(re.escape, word)), 20)
            terminal.type(KILL_LINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_man_page_is_rendered_without_a_warning(page: Path) -> None:
    missing = [name for name in ("groff", "mandoc") if not shutil.which(name)]
    if missing:
        pytest.skip(f"{' and '.join(missing)} are required")
    groff = ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", page]
    done = subprocess.run(groff, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "NAME" in done.stdout and "EXAMPLES" in done.stdout
    lint = ["mandoc", "-T", "lint", "-W", "warning", page]
    done = subprocess.run(lint, capture_output=True, text=True, timeout=30)
    # A date would be that of the last release.
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []

"""bin/demo, on a terminal and in a pipe; its checks fail if what they are about does."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from terminal import CTRL_C, Terminal

ACTS = ("A simulated xAI", "Sign in", "Serve", "Use", "Stream", "Stop")
ENVIRON = {
    "PATH": os.environ["PATH"],
    "LOWEST": os.environ.get("LOWEST", ""),
    "LANG": "C.UTF-8",
    "TERM": "xterm",
}

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="bin/demo needs curl")


def test_the_demo_shows_its_acts_on_a_terminal(tmp_path: Path) -> None:
    environ = {**ENVIRON, "TMPDIR": str(tmp_path)}
    with Terminal([str(ROOT / "bin" / "demo")], columns=80, env=environ) as terminal:
        for number, title in enumerate(ACTS, 1):
            terminal.expect(f"── {number}  {title} ─", 60)
        assert terminal.end(30) == 0
    running = len(re.findall(r" requests? running, ", terminal.screen))
    assert not re.search(r"\b1 (requests|new tokens)\b", terminal.screen)
    # The line is updated with each of the 80 tokens, and hidden in the end.
    assert running >= 80 and terminal.screen.count("\r\x1b[J") >= running
    assert terminal.screen.endswith("bin/xai-serve\r\n") and "✓" in terminal.screen
    assert os.listdir(tmp_path) == []


def test_a_demo_that_fails_shows_the_logs(tmp_path: Path) -> None:
    failing = tmp_path / "xai-login"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    folder = Path(sys.executable).parent
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "demo.py"],
        env={**ENVIRON, "PATH": f"{tmp_path}:{folder}:{ENVIRON['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("\ndemo: signing in failed; the last lines of the logs:\n")
    assert "export XAI_PROXY_ISSUER=" in done.stderr and "Traceback" not in done.stderr
    # Plain text.
    assert "\n2. Sign in: xai-login --device (" in done.stdout and "\x1b" not in done.stdout


def test_the_demo_respects_no_color_and_ends_everything_at_ctrl_c(tmp_path: Path) -> None:
    environ = {**ENVIRON, "TMPDIR": str(tmp_path), "NO_COLOR": "1"}
    with Terminal([str(ROOT / "bin" / "demo")], columns=80, env=environ) as terminal:
        terminal.expect("left to approve", 30)
        terminal.type(CTRL_C)
        assert terminal.end(20) == 130
    assert os.listdir(tmp_path) == [] and "Traceback" not in terminal.screen
    assert not re.search(r"\x1b\[[\d;]*m", terminal.screen)

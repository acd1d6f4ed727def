"""xai-login --browser with a real browser.

Chromium presses "allow" on the consent page, whose script then calls the listener, with preflight.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Browser
from checkout import ONE_CA
from sandbox import Sandbox
from terminal import Terminal


@pytest.fixture
def start_browser(tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"there is no {program} here")
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> Browser:
            return stack.enter_context(contextlib.closing(Browser(tmp_path, *arguments)))

        yield start


@pytest.fixture
def login(sandbox: Sandbox, tmp_path: Path) -> Iterator[Terminal]:
    """xai-login --browser on a terminal."""
    env = {
        "PATH": os.environ["PATH"],
        "SSL_CERT_FILE": str(ONE_CA),
        "HOME": str(tmp_path),
        "BROWSER": "true",
        "XAI_PROXY_ISSUER": sandbox.url,
        "XAI_PROXY_UPSTREAM": sandbox.url,
        "XAI_PROXY_TOKEN_PATH": str(tmp_path / "login" / "tokens.json"),
    }
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        "import sys; from xaiproxy.login import command as login; sys.exit(login.main())",
    ]
    with Terminal([*command, "--browser"], env=env) as terminal:
        yield terminal


def allow(browser: Browser, login: Terminal) -> str:
    """Press "allow" on the consent page, and return the text that the page then shows."""
    browser.open(login.expect(r"    (http://127\S+)\r\n")[1])
    assert browser.text("h1") == "Authorize Grok Build"
    browser.click("#allow")
    end = time.monotonic() + 10
    while not (outcome := browser.text("#outcome")):
        assert time.monotonic() < end
        time.sleep(0.05)
    return outcome


def signed_in(login: Terminal, tmp_path: Path) -> bool:
    saved = json.loads((tmp_path / "login" / "tokens.json").read_text())
    return saved["account"] == "sandbox@example.invalid" and "Signed in as" in login.screen


def test_the_consent_page_delivers_the_code(start_browser, login: Terminal, tmp_path: Path):
    outcome = allow(start_browser(), login)
    # The page shows this only if its script was allowed to read the listener's response.
    assert outcome == "Done. You can close this window."
    assert login.end() == 0 and signed_in(login, tmp_path)


def test_a_page_that_may_not_reach_this_machine_shows_the_code(
    start_browser, login: Terminal, sandbox: Sandbox, tmp_path: Path
):
    """A page from the internet needs a permission for loopback, which headless Chromium denies."""
    browser = start_browser(f"--ip-address-space-overrides=127.0.0.1:{sandbox.port}=public")
    if allow(browser, login).startswith("Done"):
        pytest.skip("this Chromium lets every page call loopback")
    login.type(browser.text("#code") + "\n")
    assert login.end() == 0 and signed_in(login, tmp_path)

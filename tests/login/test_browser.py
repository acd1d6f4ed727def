"""xai-login --browser with a real browser.

Chromium presses "allow" on the consent page, whose script then calls the listener, with preflight.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import ARGUMENTS
from sandbox import Sandbox
from terminal import Terminal

# The key of an element's id, W3C WebDriver section 12.
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """Chromium, driven by chromedriver with the few commands of W3C WebDriver that are needed."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={"PATH": os.environ["PATH"], "HOME": str(folder)},
            start_new_session=True,
        )
        port = next(
            int(found[1])
            for line in self.driver.stdout
            if (found := re.search(r"successfully on port (\d+)", line))
        )
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._session = ""
        options = {
            "binary": shutil.which("chromium"),
            "args": [*ARGUMENTS, f"--user-data-dir={folder}/profile", *arguments],
        }
        try:
            answer = self.command(
                "POST", "", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            )
        except BaseException:
            self.close()
            raise
        self._session = f"/{answer['sessionId']}"

    def command(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        self._connection.request(
            method, f"/session{self._session}{path}", None if body is None else json.dumps(body)
        )
        value = json.loads(self._connection.getresponse().read())["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def find(self, selector: str) -> str:
        return self.command("POST", "/element", {"using": "css selector", "value": selector})[
            ELEMENT
        ]

    def click(self, selector: str) -> None:
        self.command("POST", f"/element/{self.find(selector)}/click", {})

    def text(self, selector: str) -> str:
        return self.command("GET", f"/element/{self.find(selector)}/text")

    def close(self) -> None:
        if self._session:
            self.command("DELETE", "")
        self._connection.close()
        self.driver.terminate()
        self.driver.wait(10)
        self.driver.stdout.close()


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
    browser.command("POST", "/url", {"url": login.expect(r"    (http://127\S+)\r\n")[1]})
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

"""Chromium as tests drive it."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from chromium import ARGUMENTS

# The key of an element's id, W3C WebDriver section 12.
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """Chromium, driven by chromedriver with the few commands of W3C WebDriver that are needed."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        # chromedriver chooses a port for IPv4, and exits if that one is not free for IPv6.
        while (port := self._start(folder)) is None:
            with self.driver:
                pass
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._session = ""
        options = {
            "binary": shutil.which("chromium"),
            "args": [*ARGUMENTS, f"--user-data-dir={folder}/profile", *arguments],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            answer = self.command("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self.close()
            raise
        self._session = f"/{answer['sessionId']}"

    def _start(self, folder: Path) -> int | None:
        """Return chromedriver's port, or None if it has exited because that was not free."""
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={"PATH": os.environ["PATH"], "HOME": str(folder)},
            start_new_session=True,
        )
        output = ""
        for line in self.driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                return int(found[1])
            output += line
        assert "not available" in output, output
        return None

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

    def open(self, url: str) -> None:
        self.command("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """Run the body of a function in the page and return its result."""
        return self.command("POST", "/execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """Return what the console has shown since the last call."""
        return [line["message"] for line in self.command("POST", "/se/log", {"type": "browser"})]

    def type(self, selector: str, text: str) -> None:
        self.command("POST", f"/element/{self.find(selector)}/value", {"text": text})

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

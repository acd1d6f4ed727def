"""The program of bin/demo: a login, the proxy and its clients, against the simulated xAI.

On a terminal it has titles, ticks and a line that shows what goes on while a response arrives.
Elsewhere, and on a dumb terminal, it prints plain lines. Every act checks what it shows.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from xaiproxy.login.wording import count
from xaiproxy.style import BOLD, DIM, GREEN, style_of

ROOT = Path(__file__).parents[1]
TIMEOUT = 20.0  # seconds for a program to start
CLIENTS = 4
PAUSE = 0.05  # seconds between two requests of a client
EVENTS, EVENTS_PER_SECOND = 80, 8
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Failed(Exception):
    """Something did not work; the text is a sentence."""


class Screen:
    """stdout, on which a response arrives above a line that shows what goes on."""

    def __init__(self) -> None:
        self.style = style_of(sys.stdout, os.environ)
        # The last column stays free: some terminals erase a character in it.
        self._width = min(self.style.columns or 80, 100) - 1
        self._line = ""

    def write(self, text: str) -> None:
        # A terminal may not have a tick.
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()

    def act(self, number: int, title: str, command: str, explanation: str) -> None:
        if self.style.columns is None:
            self.write(f"\n{number}. {title}: {command} ({explanation})\n")
            return
        rule = "─" if self.style.blocks else "-"
        head = f"{rule * 2} {number}  {title} "
        self.write(f"\n{self.style.paint(BOLD, head + rule * (self._width - len(head)))}\n")
        for line in self.style.wrap(explanation, 2, False):
            self.write(f"  {self.style.paint(DIM, line)}\n")
        self.write(f"{self.style.paint(DIM, '$')} {self.style.paint(BOLD, command)}\n")

    def tick(self, text: str) -> None:
        first, *others = self.style.wrap(text, 2, False)
        sign = "✓ " if self.style.blocks else "ok: " if self.style.columns is None else "+ "
        lines = [self.style.paint(GREEN, sign) + first, *(f"  {line}" for line in others)]
        self.write("\n".join(lines) + "\n")

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """A part of the screen for the words of a response; only there `word` may be called."""
        on_terminal = self.style.columns is not None
        self._line = "  " if on_terminal else ""
        self.write(HIDE_CURSOR * on_terminal)
        try:
            yield
        finally:
            self.write("\r\x1b[J" * on_terminal)
            if self._line.strip():
                self.write(f"{self._line.rstrip() * on_terminal}\n")
            self.write(SHOW_CURSOR * on_terminal)

    def word(self, text: str, below: str = "") -> None:
        """Append to the response, with a line below it if that can be updated."""
        if self.style.columns is None:
            self.write(text)
            self._line = text.strip() if text else self._line
            return
        if text == "\n" or len(self._line) + len(text.rstrip()) > self._width:
            self.write(f"\r\x1b[J{self._line.rstrip()}\n")
            self._line = "  "
        self._line += text.strip("\n")
        status = self.style.paint(GREEN, below[: self._width])
        self.write(f"\r\x1b[J{self._line.rstrip()}\n\n{status}\x1b[2A\r")


class Running:
    """The programs of the demo, and the folder for their files."""

    def __init__(self, folder: Path, at_end: contextlib.ExitStack) -> None:
        self.folder = folder
        self._at_end = at_end

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a program, whose output goes to NAME.log."""
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        self._at_end.callback(stop, process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")


def stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    return process.wait()


def until(sentence: str, condition: Callable[[], Any]) -> Any:
    """Return the result of `condition` as soon as it is true."""
    deadline = time.monotonic() + TIMEOUT
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise Failed(sentence)
        time.sleep(0.05)
    return result


def ask(origin: str, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Return the status and the body of the response; the status is 0 without one."""
    connection = http.client.HTTPConnection(origin.partition("//")[2], timeout=TIMEOUT)
    headers = {} if body is None else {"Content-Type": "application/json"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def json_of(origin: str, path: str) -> Any:
    status, body = ask(origin, "GET", path)
    if status != 200:
        raise Failed(f"{origin}{path} answered {status}")
    return json.loads(body)


def tokens(origin: str) -> Iterator[str]:
    """Yield the text of a streamed response, as it arrives."""
    connection = http.client.HTTPConnection(origin.partition("//")[2], timeout=TIMEOUT)
    question = [{"role": "user", "content": "Who are you?"}]
    body = json.dumps({"model": "grok-4.5", "stream": True, "messages": question})
    headers = {"Content-Type": "application/json"}
    with contextlib.closing(connection):
        try:
            connection.request("POST", "/v1/chat/completions", body, headers)
            for line in connection.getresponse():
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        yield choice["delta"].get("content", "")
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"the stream broke: {error!r}") from error
    raise Failed("the stream ended early")


class Clients:
    """Threads that send one request after the other."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self.statuses: list[int] = []
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._enough.wait(PAUSE):
            self.statuses.append(ask(self._origin, "GET", "/v1/models")[0])

    @property
    def failed(self) -> int:
        return len(self.statuses) - self.statuses.count(200)


def sign_in(screen: Screen, running: Running) -> str:
    """Return the origin of the simulated xAI."""
    screen.act(
        1,
        "A simulated xAI",
        "xai-sandbox --access-token-lifetime 3",
        "an access token of the real one lasts six hours",
    )
    knobs = ["--access-token-lifetime", "3", "--auto-approve", "3", "--device-interval", "1"]
    knobs += ["--events-per-second", str(EVENTS_PER_SECOND)]
    state = str(running.folder / "login")
    running.start("sandbox", "xai-sandbox", "--port", "0", "--state", state, *knobs)
    until("the sandbox does not start", lambda: "TOKEN_PATH" in running.log("sandbox"))
    for line in running.log("sandbox").splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        if name.startswith("XAI_PROXY_"):
            [os.environ[name]] = shlex.split(value)
    origin = os.environ["XAI_PROXY_ISSUER"]
    screen.tick(f"It listens on {origin}")
    screen.act(
        2,
        "Sign in",
        "xai-login --device",
        "no need to open the page: the sandbox approves the login after 3 seconds",
    )
    if subprocess.run(["xai-login", "--device"], check=False).returncode:
        raise Failed("signing in failed")
    screen.tick("Signed in")
    return origin


def serve(screen: Screen, running: Running) -> tuple[subprocess.Popen[bytes], str]:
    """Return supervisord and the origin of the proxy."""
    screen.act(
        3,
        "Serve",
        "supervisord -c conf/supervisord.conf",
        "the proxy serves, and the refresher keeps the login alive",
    )
    os.environ.update(XAI_PROXY_PORT="0", XAI_PROXY_DRAIN_TIMEOUT="5")
    conf = str(ROOT / "conf" / "supervisord.conf")
    supervisord = running.start("supervisord", "supervisord", "-c", conf)
    address = re.compile(r"listening on (http://[\d.:]+)/v1")
    found = until("the proxy does not start", lambda: address.search(running.log("supervisord")))
    until("the proxy is not ready", lambda: ask(found[1], "GET", "/readyz")[0] == 200)
    screen.tick(f"The OpenAI-compatible endpoint is {found[1]}/v1")
    return supervisord, found[1]


def smoke(screen: Screen, origin: str) -> None:
    screen.act(4, "Use", f"bin/smoke {origin}/v1", "curl asks for the models and streams a chat")
    command = [str(ROOT / "bin" / "smoke"), f"{origin}/v1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process, screen.live():
        assert process.stdout
        while received := os.read(process.stdout.fileno(), 4096):
            for word in re.findall(r"\n|\S+ ?", received.decode()):
                screen.word(word)
    if process.returncode:
        raise Failed("the smoke test failed")
    screen.tick("Both answered")


def stream(screen: Screen, origin: str, sandbox: str) -> None:
    seconds = EVENTS // EVENTS_PER_SECOND
    screen.act(
        5,
        "Stream",
        f"POST {origin}/v1/chat/completions",
        f"a response of {seconds} seconds, while {CLIENTS} clients send further requests "
        "and tokens expire under them all",
    )
    ask(sandbox, "POST", "/_sandbox", {"events": EVENTS})
    before = json_of(sandbox, "/_sandbox")["refreshes"]
    received, seen = 0, before
    with Clients(origin) as clients, screen.live():
        for text in tokens(origin):
            received += bool(text)
            seen = json_of(sandbox, "/_sandbox")["refreshes"]
            in_flight = json_of(origin, "/status.json")["now"]["in_flight"]
            screen.word(
                text,
                f"  {count(in_flight, 'request')} running, {len(clients.statuses):,} done, "
                f"{clients.failed} failed, {count(seen - before, 'new token')}",
            )
    done, counters = len(clients.statuses), json_of(sandbox, "/_sandbox")
    if received != EVENTS:
        raise Failed(f"{received} tokens of {EVENTS} arrived")
    screen.tick(f"All {received} tokens of the response arrived")
    if clients.failed or not done:
        raise Failed(f"{clients.failed} requests of {done} failed")
    screen.tick(f"{done:,} requests, none of which failed")
    if counters["reuses"] or seen == before:
        raise Failed(f"{seen - before} refreshes, and {counters['reuses']} with a former token")
    screen.tick(
        f"{count(seen - before, 'new access token')} meanwhile; no former refresh token was sent"
    )


def end(screen: Screen, running: Running, supervisord: subprocess.Popen[bytes]) -> None:
    screen.act(6, "Stop", f"kill {supervisord.pid}", "supervisord ends the proxy and the refresher")
    pids = re.findall(r"spawned: .* with pid (\d+)", running.log("supervisord"))
    if status := stop(supervisord):
        raise Failed(f"supervisord ended with status {status}")
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), 0)
            raise Failed(f"process {pid} is left over")
    screen.tick("The proxy, the refresher and supervisord have ended, with status 0")


def show(screen: Screen) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="xaiproxy-demo-") as folder,
        contextlib.ExitStack() as at_end,
    ):
        os.environ["HOME"] = folder
        running = Running(Path(folder), at_end)
        try:
            sandbox = sign_in(screen, running)
            supervisord, origin = serve(screen, running)
            smoke(screen, origin)
            stream(screen, origin, sandbox)
            end(screen, running, supervisord)
        except Failed as failure:
            sys.stdout.flush()
            print(f"\ndemo: {failure}; the last lines of the logs:", file=sys.stderr)
            for log in sorted(running.folder.glob("*.log")):
                print(f"==> {log.name} <==", file=sys.stderr)
                print(
                    *log.read_text(errors="replace").splitlines()[-20:], sep="\n", file=sys.stderr
                )
            raise
    screen.write("\nThat was all. With an account: bin/xai-login --device, then bin/xai-serve\n")


def interrupt(number: int, _frame: object) -> NoReturn:
    # A second signal must not keep the first from ending everything that was started.
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> int:
    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        show(Screen())
    except Failed:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One login, many refreshers and proxies, tokens of seconds, and refreshers that are killed."""

from __future__ import annotations

import array
import collections
import contextlib
import http.client
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

from sandbox import Sandbox

from . import kills
from .processes import (
    PROXY,
    REFRESHER,
    STATUS,
    Process,
    await_,
    environment,
    lock_holder,
    print_progress,
    warnings,
)

REFRESHERS, PROXIES = 4, 8
# Seconds of an access token.
LIFETIME = 3
# Seconds between two requests through each proxy.
PACE = 0.1
# Seconds from one kill to the next, at random.
KILLS = (2.0, 8.0)
# Seconds between two lines of progress.
PROGRESS = 10
# Seconds from the stop of the refreshers until all report it: token_store.ALIVE and a poll interval.
REPORTED_WITHIN = 61
HELP = (
    f"{REFRESHERS} refreshers and {PROXIES} proxies on one token file, with tokens of {LIFETIME} s at an issuer "
    "that ends the login when a former refresh token comes again; a refresher is killed every few seconds; then "
    "all are stopped until a proxy and xai-login report it, which takes another minute; then, for as long again, "
    "refreshers alone are killed at every point of a refresh, and each login lost by that is counted (default: 10 minutes)"
)


class Client(threading.Thread):
    """Sends requests through one proxy at a steady pace."""

    def __init__(self, port: int, enough: threading.Event):
        super().__init__(daemon=True)
        self.port, self._enough = port, enough
        self.requests = 0
        # The duration of each request.
        self.seconds = array.array("d")
        self.failed: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        due = time.monotonic()
        while not self._enough.wait(due - time.monotonic()):
            began = time.monotonic()
            due = max(due + PACE, began)
            status, body = get(self.port, "/v1/models")
            self.seconds.append(time.monotonic() - began)
            self.requests += 1
            if status != "200":
                self.failed[f"{status} {body[:200]}"] += 1


def get(port: int, path: str) -> tuple[str, str]:
    """The status, or the name of the exception, and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return str(answer.status), answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__, ""
    finally:
        connection.close()


class Soak:
    def __init__(self, folder: pathlib.Path, running: contextlib.ExitStack, seconds: float):
        self.folder, self.running, self.seconds = folder, running, seconds
        self.sandbox = running.enter_context(
            Sandbox(access_token_lifetime=LIFETIME, device_interval=0)
        )
        self.path = folder / "login" / "tokens.json"
        self.sandbox.write_login(self.path)
        self.environ = environment(
            folder, {**self.sandbox.env, "XAI_PROXY_TOKEN_PATH": str(self.path)}
        )
        self.restarts = self.in_refresh = self.spared = 0
        self.reported_after: float | None = None
        self.refreshers = [self.start(f"refresher-{n}", *REFRESHER) for n in range(REFRESHERS)]
        ports = [
            proxy.port() for proxy in [self.start(f"proxy-{n}", *PROXY) for n in range(PROXIES)]
        ]
        enough = threading.Event()
        running.callback(enough.set)
        self.clients = [Client(port, enough) for port in ports]

    def start(self, name: str, *command: str) -> Process:
        return Process(self.running, self.folder / f"{name}.log", self.environ, *command)

    def run(self) -> None:
        await_(lambda: get(self.clients[0].port, "/readyz")[0] == "200")
        for client in self.clients:
            client.start()
        began = printed = time.monotonic()
        next_kill = began + random.uniform(*KILLS)
        while (now := time.monotonic()) < began + self.seconds:
            if now >= next_kill:
                self.kill_one()
                next_kill = time.monotonic() + random.uniform(*KILLS)
            if now >= printed + PROGRESS:
                printed += PROGRESS
                print_progress(now - began, self.seconds, self.figures())
            time.sleep(0.05)

    def kill_one(self) -> None:
        """Kill any of them, half of the time one that is refreshing."""
        victim = random.choice(self.refreshers)
        if random.random() < 0.5:
            with contextlib.suppress(TimeoutError):
                victim = self.holder(LIFETIME)
        victim.signal(signal.SIGSTOP)
        if self.holds_only_copy(victim):
            victim.signal(signal.SIGCONT)
            self.spared += 1
            return
        self.in_refresh += victim is lock_holder(self.path, self.refreshers)
        victim.kill()
        number = self.refreshers.index(victim)
        self.refreshers[number] = self.start(f"refresher-{number}", *REFRESHER)
        self.restarts += 1

    def holder(self, seconds: float) -> Process:
        """The next to have the lock, at some moment of its refresh. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not (one := lock_holder(self.path, self.refreshers)):
            if time.monotonic() > end:
                raise TimeoutError
        time.sleep(random.uniform(0, 0.015))
        return one

    def holds_only_copy(self, one: Process) -> bool:
        """Whether a new login may be in the memory of this process alone: a kill would lose it."""
        try:
            with open(self.path.with_name("tokens.json.new"), "rb") as file:
                return one is lock_holder(self.path, self.refreshers) and file.read(1) in (
                    b"",
                    b" ",
                )
        except FileNotFoundError:
            return False

    def stop_all(self) -> None:
        """Stop the refreshers, as if they hung, and measure the time until a proxy and xai-login
        report it.
        """
        self.sandbox.set(access_token_lifetime=3600)
        refreshes = self.sandbox.counters()["refreshes"]
        self.sandbox.wait(lambda seen: seen["refreshes"] > refreshes)
        ready = self.clients[0].port
        await_(lambda: "signed in" in get(ready, "/readyz")[1])
        print(
            f"All refreshers are stopped; a proxy must report it within {REPORTED_WITHIN} s",
            flush=True,
        )
        began = time.monotonic()
        for one in self.refreshers:
            one.signal(signal.SIGSTOP)
        with contextlib.suppress(TimeoutError):
            await_(lambda: "no refresher" in get(ready, "/readyz")[1], REPORTED_WITHIN)
            if "Refresher   not running" in self.status():
                self.reported_after = time.monotonic() - began
        for one in self.refreshers:
            one.signal(signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            await_(lambda: "signed in" in get(ready, "/readyz")[1])

    def status(self) -> str:
        return subprocess.run(
            [sys.executable, *STATUS],
            env=self.environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
        ).stdout

    def figures(self) -> dict[str, int]:
        counters = self.sandbox.counters()
        return {
            "requests": sum(client.requests for client in self.clients),
            "failed": sum(client.failed.total() for client in self.clients),
            "refreshes": counters["refreshes"],
            "reuses": counters["reuses"],
            "restarts": self.restarts,
        }

    def report(self) -> int:
        figures = self.figures()
        rows = {
            **figures,
            "of the restarts, in a refresh": self.in_refresh,
            "not killed, as it had the only copy": self.spared,
            "slowest request, ms": round(
                1000 * max(max(client.seconds) for client in self.clients)
            ),
            "stopped refreshers reported after, s": "never"
            if self.reported_after is None
            else round(self.reported_after),
        }
        print("\n" + "\n".join(f"{name:<36} {value:>8}" for name, value in rows.items()))
        failed = sum((client.failed for client in self.clients), collections.Counter())
        for text, count in failed.most_common(5):
            print(f"failed {count} times: {text}")
        for text in warnings(self.folder)[:10]:
            print(f"logged: {text}")
        return 1 if figures["failed"] or figures["reuses"] or self.reported_after is None else 0


def soak(folder: pathlib.Path, running: contextlib.ExitStack, seconds: float) -> int:
    run = Soak(folder, running, seconds)
    run.run()
    run.stop_all()
    lost = run.report()
    for process in run.refreshers:
        process.kill()
    return max(lost, kills.soak(folder, running, seconds))

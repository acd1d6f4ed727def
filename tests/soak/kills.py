"""Refreshers of one login, killed at any point of a refresh: which kills lose the login, and at
which point.

Only one point may: while the successor of the refresh token is in the killed process, on its way to
it, or not yet requested (docs/login-safety.md, property 3). The folder shows the point; a process is
stopped while its folder is read.
"""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
import random
import signal
import time

from sandbox import Sandbox, until

from xaiproxy import tokens

from .processes import REFRESHER, Process, environment, lock_holder

REFRESHERS = 3
# Second of an access token: two refreshes in each.
LIFETIME = 1
# Seconds within which a refresh is over, mostly.
SPREAD = 0.03
# Seconds between two lines of progress.
PROGRESS = 10
# Seconds for the next refresh after a kill.
REFRESH_TIMEOUT = 20
WAITING, PREPARING, SPENDING, WRITTEN = (
    "no lock",
    "lock, nothing sent",
    "sent, or about to be",
    "successor written",
)


class Kills:
    def __init__(self, folder: pathlib.Path, running: contextlib.ExitStack, seconds: float):
        self.folder, self.running, self.seconds = folder, running, seconds
        self.sandbox = running.enter_context(
            Sandbox(access_token_lifetime=LIFETIME, device_interval=0)
        )
        self.path = folder / "killed" / "tokens.json"
        self.sandbox.write_login(self.path)
        self.environ = environment(
            folder, {**self.sandbox.env, "XAI_PROXY_TOKEN_PATH": str(self.path)}
        )
        self.refreshers = [self.start(number) for number in range(REFRESHERS)]
        # Kills by point.
        self.kills: collections.Counter[str] = collections.Counter()
        # Lost logins by the point of the kill before.
        self.lost: collections.Counter[str] = collections.Counter()
        self.killed_at = "before any kill"
        self.reuses_seen = 0
        self.stuck = 0

    def start(self, number: int) -> Process:
        return Process(self.running, self.folder / f"killed-{number}.log", self.environ, *REFRESHER)

    def run(self) -> None:
        began = printed = time.monotonic()
        while (now := time.monotonic()) < began + self.seconds:
            self.kill_one()
            if now >= printed + PROGRESS:
                printed = now
                print(
                    f"[{now - began:.0f} of {self.seconds:.0f} s] kills {self.kills.total()}, "
                    f"logins lost {self.lost.total()}",
                    flush=True,
                )

    def kill_one(self) -> None:
        """Kill the next one that has the lock, most of the time, and wait for the next refresh."""
        victim = self.holder() if random.random() < 0.9 else random.choice(self.refreshers)
        # A request of the refresher killed before may have arrived late.
        self.account()
        victim.signal(signal.SIGSTOP)
        self.killed_at = self.point(victim)
        victim.kill()
        self.kills[self.killed_at] += 1
        number = self.refreshers.index(victim)
        self.refreshers[number] = self.start(number)
        token = self.token()
        try:
            until(lambda: self.account() or self.token() != token, REFRESH_TIMEOUT)
        except AssertionError:
            self.stuck += 1

    def account(self) -> bool:
        """Whether the login was lost; the loss is then counted, and replaced by another login."""
        reuses = self.sandbox.counters()["reuses"]
        if reuses == self.reuses_seen:
            return False
        self.reuses_seen = reuses
        self.lost[self.killed_at] += 1
        self.sandbox.write_login(self.path)
        return True

    def token(self) -> str:
        return json.loads(self.path.read_bytes())["refresh_token"]

    def holder(self) -> Process:
        """The next to have the lock, at some moment of its refresh; a random one if none has it."""
        end = time.monotonic() + REFRESH_TIMEOUT
        while time.monotonic() < end:
            if one := lock_holder(self.path, self.refreshers):
                time.sleep(random.uniform(0, SPREAD))
                return one
        return random.choice(self.refreshers)

    def point(self, one: Process) -> str:
        if one is not lock_holder(self.path, self.refreshers):
            return WAITING
        try:
            text = self.path.with_name("tokens.json.new").read_bytes()
            left = json.loads(text)
        except FileNotFoundError:
            return PREPARING
        except ValueError:
            return SPENDING if text[:1] == b" " or not text else PREPARING
        return (
            PREPARING if left["replaces"] == tokens.fingerprint(left["refresh_token"]) else WRITTEN
        )

    def report(self) -> int:
        print(f"\n{'killed at':<24} {'kills':>8} {'logins lost':>12}")
        for point in (WAITING, PREPARING, SPENDING, WRITTEN):
            print(f"{point:<24} {self.kills[point]:>8} {self.lost[point]:>12}")
        print(f"{'no refresh after it':<24} {self.stuck:>8}")
        return 1 if self.stuck or self.lost.total() > self.lost[SPENDING] else 0


def soak(folder: pathlib.Path, running: contextlib.ExitStack, seconds: float) -> int:
    run = Kills(folder, running, seconds)
    run.run()
    return run.report()

"""Two copies of one login and one Secret of a real API server; proxies that hold only the Secret.

A refresh token may be presented twice only after a kill between the claim and the issuer's answer:
the next refresher cannot know whether it was spent. The first part spares that moment, and the
second part consists of kills there.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from kube import MISSING, PUBLISH, Kube, in_pod
from mounted_secret import MountedSecret
from sandbox import Sandbox
from service import Service

from xaiproxy.tokens import fingerprint

from .login import Client, get
from .processes import (
    PROXY,
    REFRESHER,
    Process,
    await_,
    environment,
    lock_holder,
    print_progress,
    warnings,
)

PROXIES = 4
# Seconds of an access token.
LIFETIME = 8
# Seconds from one kill to the next, at random.
KILLS = (2.0, 6.0)
# Seconds from one revocation of all access tokens to the next.
REVOCATIONS = 20.0
# Seconds between two reads of the Secret. A kubelet takes 74 to 78 s, in which these tokens expire.
SYNC_INTERVAL = 0.3
# Seconds between two lines of progress.
PROGRESS = 10
# Seconds for what has to follow a kill or a revocation.
TIMEOUT = 40
# Seconds within which one token is published, on average.
PUBLISHED_EVERY = 12
# Grace periods of the issuer, in seconds, under the kills between claim and answer.
GRACES = (60, 0)
TOKEN_ENDPOINT = "/oauth2/token"
PUBLISHED = "published in the Secret"
ASKED = "asked the refresher at"
REPORTED = "a proxy reports that the API refuses"
# EX_UNAVAILABLE of sysexits.h.
UNAVAILABLE = 69
HELP = (
    f"two refreshers with a copy of one login each and tokens of {LIFETIME} s, one Secret of a real Kubernetes API "
    f"server, and {PROXIES} proxies that hold nothing but the Secret, for MIN minutes (default: 10): every few seconds a "
    f"refresher is killed, or gets a new copy of the login, and every {REVOCATIONS:.0f} s all access tokens are "
    "revoked; then kills between claim and answer, for another minute; needs ../shared/kube, etcd and root"
)


class Point(enum.Enum):
    """How far a refresher has come."""

    PUBLISHED = "published"
    SAVED = "saved, not yet published"
    CLAIMED = "claimed, not yet saved"


class Refresher:
    """A pod and its volume: `path` is that of the token file there."""

    def __init__(self, cluster: Cluster, name: str):
        self._cluster, self._name, self._pods = cluster, name, 0
        self.path = cluster.folder / name / "tokens.json"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]

    @property
    def uid(self) -> str:
        return f"{self._name}-{self._pods}"

    def start(self, is_new_pod: bool = True) -> None:
        """`is_new_pod`: whether another pod takes the volume over, or the container restarts."""
        self._pods += is_new_pod
        cluster = self._cluster
        environ = {
            **cluster.environ,
            **cluster.kube.environ,
            "XAI_PROXY_TOKEN_PATH": str(self.path),
            "XAI_PROXY_PUBLISH": PUBLISH,
            "XAI_PROXY_ASK_BIND": f"127.0.0.1:{self.port}",
            "POD_UID": self.uid,
        }
        log, prefix = cluster.folder / f"refresher-{self._name}.log", in_pod(cluster.kube.account)
        self.process = Process(cluster.running, log, environ, *REFRESHER, prefix=prefix)

    def take_copy(self, other: Refresher) -> None:
        """Replace the volume by a copy of another one, as from a snapshot."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir(mode=0o700)
        self.path.touch(0o600)
        self.path.write_bytes(other.path.read_bytes())

    def login(self) -> dict[str, Any]:
        login: dict[str, Any] = json.loads(self.path.read_bytes())
        return login

    def mark(self) -> str:
        return fingerprint(self.login()["refresh_token"])

    def point(self) -> Point:
        """It is stopped meanwhile."""
        if self._cluster.kube.claim() == f"{self.mark()}/{self.uid}":
            return Point.CLAIMED
        is_published = self._cluster.published() == self.login()["access_token"]
        return Point.PUBLISHED if is_published else Point.SAVED


class Kubelet(threading.Thread):
    """Mounts the Secret in the proxies' folder."""

    def __init__(self, kube: Kube, folder: pathlib.Path, enough: threading.Event):
        super().__init__(daemon=True)
        self.secret = MountedSecret(folder)
        self.swaps = 0
        self._kube, self._enough = kube, enough
        self._content: str | None = None

    def run(self) -> None:
        while not self._enough.wait(SYNC_INTERVAL):
            content = self._kube.data().get("tokens.json")
            if content is not None and content != self._content:
                self.secret.swap(content)
                self._content = content
                self.swaps += 1


class Cluster:
    def __init__(self, folder: pathlib.Path, running: contextlib.ExitStack, seconds: float):
        self.folder, self.running, self.seconds = folder, running, seconds
        self.kube = Kube(folder / "kube", seconds=int(seconds) + 900, running=running)
        self.kube.make_secret()
        self.sandbox = running.enter_context(
            Sandbox(access_token_lifetime=LIFETIME, device_interval=0)
        )
        self.environ = environment(folder, self.sandbox.env)
        self.kills: collections.Counter[Point] = collections.Counter()
        self.copies = self.spared = self.revocations = 0
        self.outcomes: dict[int, str] = {}
        first, second = self.refreshers = [Refresher(self, "a"), Refresher(self, "b")]
        self.sandbox.write_login(first.path)
        second.take_copy(first)
        self.holder = first
        for one in self.refreshers:
            one.start()
        self.enough = threading.Event()
        running.callback(self.enough.set)
        self.kubelet = Kubelet(self.kube, folder / "mounted", self.enough)
        self.kubelet.start()
        await_(self.kubelet.secret.path.exists)
        service = Service(socket.create_server(("127.0.0.1", 0)), lambda: self.holder.port)
        running.callback(service.close)
        environ = {
            **self.environ,
            "XAI_PROXY_TOKEN_PATH": str(self.kubelet.secret.path),
            "XAI_PROXY_REFRESHER": service.url,
        }
        proxies = [
            Process(running, folder / f"proxy-{number}.log", environ, *PROXY)
            for number in range(PROXIES)
        ]
        self.clients = [Client(proxy.port(), self.enough) for proxy in proxies]

    # The first part

    def run(self) -> None:
        for client in self.clients:
            await_(lambda port=client.port: get(port, "/readyz")[0] == "200")
            client.start()
        began = printed = time.monotonic()
        next_kill, next_revocation = began + random.uniform(*KILLS), began + REVOCATIONS
        while (now := time.monotonic()) < began + self.seconds:
            self.find_holder()
            if now >= next_revocation:
                self.revoke()
                next_revocation = time.monotonic() + REVOCATIONS
            elif now >= next_kill:
                self.kill_or_copy()
                next_kill = time.monotonic() + random.uniform(*KILLS)
            if now >= printed + PROGRESS:
                printed += PROGRESS
                print_progress(now - began, self.seconds, self.figures())
            time.sleep(0.05)
        self.enough.set()
        for client in self.clients:
            client.join()

    def find_holder(self) -> None:
        """Which one has the latest login; the other one may have the same."""
        self.holder = max(self.refreshers, key=lambda one: one.login()["obtained_at"])

    def other(self) -> Refresher:
        return next(one for one in self.refreshers if one is not self.holder)

    def published(self) -> str | None:
        """The published access token."""
        token: str | None = self.kube.published().get("access_token")
        return token

    def revoke(self) -> None:
        """Revoke all access tokens, and wait for one that is published after that.

        The refresher can be asked: if it were still starting, refusals would be passed on.
        """
        await_(lambda: get(self.holder.port, "/healthz")[0] == "200", TIMEOUT)
        self.revocations += 1
        self.sandbox.kill()
        revoked = self.published()
        await_(lambda: self.published() != revoked, TIMEOUT)

    def kill_or_copy(self) -> None:
        other = self.other()
        if random.random() < 0.4:
            other.process.kill()
            other.take_copy(self.holder)
            other.start()
            self.copies += 1
            return
        holder = self.holder
        random.choice((self.wait_for_refresh, self.wait_for_save, lambda one: None))(holder)
        holder.process.signal(signal.SIGSTOP)
        point = holder.point()
        # If the other one has the claimed token, and this one does not publish its successor in
        # time, it may present the token again.
        if point is Point.CLAIMED or (
            point is Point.SAVED and self.kube.claim().startswith(other.mark())
        ):
            holder.process.signal(signal.SIGCONT)
            self.spared += 1
            return
        holder.process.kill()
        self.kills[point] += 1
        holder.start(is_new_pod=random.random() < 0.5)

    def wait_for_refresh(self, one: Refresher) -> None:
        """Wait for some moment of the next refresh."""
        wait_shortly(lambda: lock_holder(one.path, [one.process]))
        time.sleep(random.uniform(0, 0.06))

    def wait_for_save(self, one: Refresher) -> None:
        """Wait until the next login is saved, some milliseconds before it is published."""
        mark = one.mark()
        wait_shortly(lambda: one.mark() != mark)
        time.sleep(random.uniform(0, 0.01))

    # The second part

    def kill_after_claim(self, grace: int) -> str:
        """Return what becomes of the login."""
        self.find_holder()
        holder = self.holder
        self.other().process.kill()
        slow = {"path": TOKEN_ENDPOINT, "grant_type": "refresh_token", "delay": TIMEOUT}
        refreshes = self.sandbox.counters()["refreshes"]
        self.sandbox.set(answers=[slow], grace=grace)
        self.sandbox.wait(lambda seen: seen["refreshes"] > refreshes)
        holder.process.signal(signal.SIGSTOP)
        spent = holder.mark()
        holder.process.kill()
        self.sandbox.set(answers=[])
        holder.start()

        def outcome() -> str:
            if (self.kube.published().get("refresh_error") or {}).get("terminal"):
                return "ended, and published as ended"
            renewed = holder.mark() != spent
            return "renewed" if renewed and holder.point() is Point.PUBLISHED else ""

        try:
            found: str = await_(outcome, TIMEOUT)
        except TimeoutError:
            return ""
        if found != "renewed":
            # A person signs in.
            self.sandbox.write_login(holder.path)
            await_(lambda: self.published() == holder.login()["access_token"], TIMEOUT)
        return found

    # The report

    def logged(self, logs: str, text: str) -> int:
        return sum(log.read_text().count(text) for log in self.folder.glob(logs))

    def figures(self) -> dict[str, int]:
        failed = sum((client.failed for client in self.clients), collections.Counter())
        unavailable = sum(count for text, count in failed.items() if text.startswith("503 "))
        counters = self.sandbox.counters()
        return {
            "published": self.logged("refresher-*.log", PUBLISHED),
            "presented": counters["refreshes"],
            "presented twice": counters["reuses"],
            "requests": sum(client.requests for client in self.clients),
            "lost": failed.total() - unavailable,
            "503": unavailable,
            "asks": self.logged("proxy-*.log", ASKED),
        }

    def report(self, figures: dict[str, int]) -> int:
        """`figures`: at the end of the first part. Print the table; return the exit status."""
        rows: dict[str, object] = {
            "tokens published": figures["published"],
            "refresh tokens presented": figures["presented"],
            "presented twice": figures["presented twice"],
            "swaps of the mounted Secret": self.kubelet.swaps,
            **{f"kills of the holder, {point.value}": self.kills[point] for point in Point},
            "not killed, as the token may be spent": self.spared,
            "copies of the login to the other volume": self.copies,
            "requests": figures["requests"],
            "lost": figures["lost"],
            "503, to be repeated": figures["503"],
            "revocations of all access tokens": self.revocations,
            "asks of proxies": figures["asks"],
            "that reached the refresher first": self.logged("refresher-*.log", REPORTED),
            **{
                f"kill after the claim, grace {grace} s": outcome or "neither renewed nor ended"
                for grace, outcome in self.outcomes.items()
            },
        }
        print("\n" + "\n".join(f"{name:<46} {value:>8}" for name, value in rows.items()))
        failed = sum((client.failed for client in self.clients), collections.Counter())
        for text, count in failed.most_common(10):
            print(f"failed {count} times: {text}")
        for text in warnings(self.folder)[:30]:
            print(f"logged: {text[:300]}")
        good = (
            not figures["lost"]
            and not figures["presented twice"]
            and figures["published"] >= self.seconds // PUBLISHED_EVERY
            and (figures["asks"] or not self.revocations)
            and all(self.outcomes.values())
        )
        return 0 if good else 1


def wait_shortly(happened: Callable[[], object]) -> None:
    """Wait until something happens, for the life of a token at most."""
    end = time.monotonic() + LIFETIME
    while not happened() and time.monotonic() < end:
        time.sleep(0.001)


def soak(folder: pathlib.Path, running: contextlib.ExitStack, seconds: float) -> int:
    missing = MISSING or ("" if os.geteuid() == 0 else "only root can mount a service account")
    if missing:
        print(f"soak: {missing}")
        return UNAVAILABLE
    print("The API server is starting", flush=True)
    cluster = Cluster(folder, running, seconds)
    cluster.run()
    figures = cluster.figures()
    print("Kills between claim and answer", flush=True)
    for grace in GRACES:
        cluster.outcomes[grace] = cluster.kill_after_claim(grace)
    return cluster.report(figures)

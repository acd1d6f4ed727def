"""Many proxies under one refresher: each reads a copy of the published token that arrives late, as
the kubelets of a cluster bring it.
"""

from __future__ import annotations

import collections
import contextlib
import pathlib
import re
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mounted_secret import MountedSecret
from sandbox import Sandbox

from tests.bench import machine

from .agents import EVENTS, Agent
from .copies import ARRIVAL, Kubelet
from .login import get
from .processes import PROXY, REFRESHER, Process, await_, environment, print_progress, warnings

PROXIES = 50
# Seconds of an access token, and at least so many before its expiry it is renewed: each ten seconds.
LIFETIME, SKEW = 20, 10
# Seconds between two lines of progress.
PROGRESS = 10
# Seconds for all proxies to serve again after a refusal.
RECOVERY = 60
HELP = (
    f"{PROXIES} proxies with copies of the published access token, which lasts {LIFETIME} s and reaches each of "
    f"them {ARRIVAL[0]:.0f} to {ARRIVAL[1]:.0f} s late, under one refresher, with one agent each; then the API "
    "refuses the token, and the outage is measured (default: 10 minutes)"
)


class Refusal(NamedTuple):
    """What an early refusal of the access token cost.

    `dark`: proxies that did not serve again; `outages`: seconds of each proxy that failed any
    request, from the refusal to its last failure; `statuses`: those failures; `refreshes`: by how
    many the refresher answered
    """

    dark: int
    outages: list[float]
    statuses: collections.Counter[str]
    refreshes: int

    def rows(self) -> dict[str, Any]:
        return {
            "then refused: proxies with failures": len(self.outages),
            "requests that failed": ", ".join(
                f"{count} x {status}" for status, count in self.statuses.items()
            ),
            "refreshes for it": self.refreshes,
            "outage of a proxy, median, s": round(statistics.median(self.outages or [0.0]), 1),
            "longest outage, s": round(max(self.outages, default=0.0), 1),
            "proxies that never served again": self.dark,
        }

    def lost(self) -> bool:
        return bool(self.dark) or self.refreshes != 1 or set(self.statuses) - {"503"} != set()


class Soak:
    def __init__(
        self, folder: pathlib.Path, running: contextlib.ExitStack, seconds: float, count: int
    ):
        self.folder, self.running, self.seconds = folder, running, seconds
        self.sandbox = running.enter_context(
            Sandbox(
                access_token_lifetime=LIFETIME,
                device_interval=0,
                events=EVENTS,
                events_per_second=1,
            )
        )
        login, self.published = folder / "login/tokens.json", folder / "published/tokens.json"
        self.sandbox.write_login(login)
        self.published.parent.mkdir()
        self.enough = threading.Event()
        self.mounts = [MountedSecret(folder / f"mount-{number}") for number in range(count)]
        self.kubelet = Kubelet(self.published, self.mounts, self.enough)
        self.refresher = self.start(
            "refresher",
            *REFRESHER,
            XAI_PROXY_TOKEN_PATH=str(login),
            XAI_PROXY_REFRESH_SKEW=str(SKEW),
            XAI_PROXY_PUBLISH=f"file:{self.published}",
            XAI_PROXY_ASK_BIND="127.0.0.1:0",
        )
        asked = await_(lambda: re.search(r"can ask at (http://[0-9.:]+)", self.log("refresher")))
        self.ask = asked[1]
        # Some at a time: each takes half a second of CPU time to start.
        self.proxies = []
        ports = []
        for number, mount in enumerate(self.mounts):
            self.proxies.append(self.proxy(number, mount))
            ports.append(self.proxies[-1].port())
        self.agents = [Agent(port, self.enough) for port in ports]

    def start(self, name: str, *command: str, **settings: str) -> Process:
        environ = environment(self.folder, {**self.sandbox.env, **settings})
        return Process(self.running, self.folder / f"{name}.log", environ, *command)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def proxy(self, number: int, mount: MountedSecret) -> Process:
        return self.start(
            f"proxy-{number}",
            *PROXY,
            XAI_PROXY_TOKEN_PATH=str(mount.path),
            XAI_PROXY_REFRESHER=self.ask,
        )

    def run(self) -> None:
        self.kubelet.start()
        for agent in self.agents:
            await_(lambda: get(agent.port, "/readyz")[0] == "200", RECOVERY)
        self.began_cpu = machine.cpu_seconds([each.pid for each in self.proxies])
        self.began = time.monotonic()
        for agent in self.agents:
            agent.start()
        self.progress(self.seconds, lambda: False)

    def finish(self) -> None:
        """Let open streams end."""
        self.enough.set()
        for agent in self.agents:
            agent.join()

    def progress(self, seconds: float, over: Callable[[], bool]) -> None:
        began = printed = time.monotonic()
        while (now := time.monotonic()) < began + seconds and not over():
            if now >= printed + PROGRESS:
                printed += PROGRESS
                print_progress(now - began, seconds, self.counts())
            time.sleep(0.1)

    def counts(self) -> dict[str, int]:
        return {
            "requests": sum(agent.requests for agent in self.agents),
            "streams": sum(agent.streams for agent in self.agents),
            "failed": sum(len(agent.failed) for agent in self.agents),
            "tokens published": self.kubelet.rotations,
            "copies that arrived": self.kubelet.arrivals,
        }

    def cost(self) -> dict[str, Any]:
        pids = [each.pid for each in self.proxies]
        used = machine.cpu_seconds(pids) - self.began_cpu
        memory = machine.memory(pids)
        return {
            "CPU of a proxy, % of a core": round(
                100 * used / len(pids) / (time.monotonic() - self.began), 2
            ),
            "memory of a proxy (PSS), MiB": round(memory["pss"] / len(pids) / 1024, 1),
            "memory of a proxy (RSS), MiB": round(memory["rss"] / len(pids) / 1024, 1),
        }

    def all_have_arrived(self) -> bool:
        content = self.published.read_text()
        return all(mount.path.read_text() == content for mount in self.mounts)

    def refuse(self) -> Refusal:
        """Have the API refuse the token early, once all proxies have one that lasts."""
        self.sandbox.set(access_token_lifetime=3600)
        refreshes = self.sandbox.counters()["refreshes"]
        self.sandbox.wait(lambda seen: seen["refreshes"] > refreshes, 2 * LIFETIME)
        await_(self.all_have_arrived, RECOVERY)
        refreshes = self.sandbox.counters()["refreshes"]
        before = [len(agent.failed) for agent in self.agents]
        began = time.monotonic()
        self.sandbox.kill()
        print("The API refuses the access token from now on", flush=True)
        served = 0

        def over() -> bool:
            nonlocal served
            served = sum(get(agent.port, "/v1/models")[0] == "200" for agent in self.agents)
            return served == len(self.agents)

        self.progress(RECOVERY, over)
        failed = [agent.failed[count:] for agent, count in zip(self.agents, before)]
        return Refusal(
            len(self.agents) - served,
            [each[-1][0] - began for each in failed if each],
            collections.Counter(text.split(" ")[0] for each in failed for _, text in each),
            self.sandbox.counters()["refreshes"] - refreshes,
        )


def soak(
    folder: pathlib.Path, running: contextlib.ExitStack, seconds: float, count: int = PROXIES
) -> int:
    run = Soak(folder, running, seconds, count)
    running.callback(run.enough.set)
    run.run()
    counts, cost = run.counts(), run.cost()
    slowest = max(agent.slowest for agent in run.agents)
    failed = [text for agent in run.agents for _, text in agent.failed]
    reuses = run.sandbox.counters()["reuses"]
    refusal = run.refuse()
    run.finish()
    rows = {
        "proxies": count,
        **counts,
        "slowest request, ms": round(1000 * slowest),
        "former refresh tokens sent again": reuses,
        **cost,
        **refusal.rows(),
    }
    print("\n" + "\n".join(f"{name:<36} {value!s:>12}" for name, value in rows.items()))
    for text, times in collections.Counter(failed).most_common(5):
        print(f"failed {times} times: {text}")
    for text in warnings(folder)[:10]:
        print(f"logged: {text[:300]}")
    return 1 if failed or reuses or refusal.lost() else 0

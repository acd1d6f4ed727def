"""supervisord restarts either program under load, and only what the documentation allows is lost."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from .loaded import Load, Row
from .login import get
from .processes import await_

CONF = pathlib.Path(__file__).parents[2] / "conf/supervisord.conf"
# Seconds: XAI_PROXY_DRAIN_TIMEOUT.
DRAIN = 5
# Seconds: startsecs of the conf, before which an end counts as a failure to start.
STEADY = 5.5
# Seconds until a restarted program serves.
BACK = 15


class Supervised:
    """supervisord with the project's conf, on a port that stays the same."""

    def __init__(self, run: Load):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self._process = run.start(
            "supervisord",
            "-m",
            "supervisor.supervisord",
            "-c",
            str(CONF),
            XAI_PROXY_PORT=str(self.port),
            XAI_PROXY_DRAIN_TIMEOUT=str(DRAIN),
            PATH=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        )
        run.running.callback(self.stop)
        await_(self.serves)

    def stop(self) -> None:
        """End supervisord; may be called twice."""
        self._process.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)

    def serves(self) -> bool:
        return get(self.port, "/v1/models")[0] == "200"

    def pids(self, program: str) -> list[int]:
        """The pids of all that were started, the latest last."""
        return [
            int(pid)
            for pid in re.findall(
                rf"spawned: '{program}' with pid (\d+)", self._process.log.read_text()
            )
        ]

    def end(self, program: str, number: int) -> float:
        """Signal a program; return the seconds until another runs in its place and the proxy serves."""
        pids, began = self.pids(program), time.monotonic()
        os.kill(pids[-1], number)
        await_(lambda: len(self.pids(program)) > len(pids), BACK + DRAIN)
        await_(self.serves, BACK)
        return time.monotonic() - began


def restarts(run: Load) -> Iterator[Row]:
    # From here on, only the supervised ones run.
    run.refresher.kill()
    run.proxy.kill()
    supervised = Supervised(run)
    time.sleep(STEADY)
    for restart in (kill_proxy, terminate_proxy, kill_refresher, terminate_refresher):
        yield restart(run, supervised)
        time.sleep(STEADY)
    supervised.stop()


def kill_proxy(run: Load, supervised: Supervised) -> Row:
    streams = run.streams(run.counts.restarted, 60, supervised.port)
    with run.requests(supervised.port) as requests:
        down = supervised.end("proxy", signal.SIGKILL)
        found = streams.result()
    lost = unseen(streams.count, found) + unexpected(
        requests.failed(),
        "RemoteDisconnected",
        "ConnectionResetError",
        "ConnectionRefusedError",
        "IncompleteRead",
    )
    return Row(
        "proxy, SIGKILL",
        f"all {streams.count} streams broke, as they must; down for {down:.1f} s",
        lost,
        "",
        requests.latency(),
    )


def terminate_proxy(run: Load, supervised: Supervised) -> Row:
    long = run.streams(run.counts.restarted, 60, supervised.port)
    short = run.streams(run.counts.restarted, DRAIN - 3, supervised.port)
    with run.requests(supervised.port) as requests:
        down = supervised.end("proxy", signal.SIGTERM)
        found, lost = long.result(), short.lost()
    return Row(
        "proxy, SIGTERM",
        f"{short.count} streams ended within the drain of {DRAIN} s, {long.count} were aborted; "
        f"down for {down:.1f} s",
        lost + unseen(long.count, found) + unexpected(requests.failed(), "ConnectionRefusedError"),
        "",
        requests.latency(),
    )


def kill_refresher(run: Load, supervised: Supervised) -> Row:
    return refresher(run, supervised, signal.SIGKILL)


def terminate_refresher(run: Load, supervised: Supervised) -> Row:
    return refresher(run, supervised, signal.SIGTERM)


def refresher(run: Load, supervised: Supervised, number: signal.Signals) -> Row:
    streams = run.streams(run.counts.restarted, 6, supervised.port)
    refreshes = run.sandbox.counters()["refreshes"]
    with run.requests(supervised.port) as requests:
        saved = run.path.stat().st_mtime_ns
        # A new login in memory alone would be lost: see login.py.
        await_(lambda: run.path.stat().st_mtime_ns != saved)
        down = supervised.end("refresher", number)
        run.sandbox.wait(lambda seen: seen["refreshes"] > refreshes + 1)
        lost = streams.lost()
    return Row(
        f"refresher, {number.name}",
        f"under {streams.count} streams and short requests; down for {down:.1f} s",
        lost + requests.lost(),
        "",
        requests.latency(),
    )


def unseen(count: int, found: dict[str, int]) -> list[str]:
    """Streams that did not break where the proxy did, or that seemed complete."""
    broken = found["errors"]
    if (broken, found["answers"]) == (count, 0):
        return []
    return [f"{count - broken} of {count} streams did not break visibly"]


def unexpected(failed: dict[str, int], *expected: str) -> list[str]:
    return [
        f"{count} requests: {text}"
        for text, count in failed.items()
        if text.strip() not in expected
    ]

"""The steps of the play, in the order of a pod's life.

Each method `step_...` returns what was seen, and fails an assertion if the login or a request was
lost. Each step leaves the login in the volume for the next one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pathlib
import re
import shutil
import time
from collections.abc import Callable
from typing import Any

from sandbox import Sandbox

from . import load, manifest, memory, shared_play
from .cluster import SECRETS, Cluster, Pod, wait

SEED = "agent-login-seed"
# Seconds of an access token: a refresh every 5 s.
LIFETIME = 10
# Seconds for the next refresh, also after a kill: three tries are made within 30 s.
REFRESH = 45
# Seconds for which the token endpoint withholds a response.
DELAY = 3
KILLS = 3
# Seconds after SIGTERM for which requests still arrive from clients that have not seen an endpoint go.
ROUTED = 2
DRAIN_DELAY = 5
REFUSAL = {"status": 503, "headers": {"Retry-After": "1"}}


class Play:
    def __init__(self, cluster: Cluster, sandbox: Sandbox, folder: pathlib.Path):
        self._cluster = cluster
        self._sandbox = sandbox
        self._folder = folder
        self._objects = manifest.rendered(folder)
        self._ports = load.free_ports()
        self._pods = 0
        self._volumes = 0
        self._volume = self._new_volume()
        self._seed = ""
        self._pod: Pod | None = None
        # Seconds that the last pod needed.
        self._started_after = 0.0

    @property
    def port(self) -> int:
        return self._ports[0]

    @property
    def pod(self) -> Pod:
        assert self._pod is not None
        return self._pod

    @property
    def _tokens(self) -> pathlib.Path:
        return self._volume / "login/tokens.json"

    # Volumes and pods

    def _new_volume(self) -> pathlib.Path:
        """Bind the claim to an empty folder, which belongs to root."""
        self._volumes += 1
        folder = self._folder / f"volume-{self._volumes}"
        folder.mkdir()
        self._cluster.bind(self._objects["PersistentVolumeClaim"], manifest.volume(folder))
        return folder

    def _start(self, **environ: str) -> Pod:
        self._pods += 1
        issuer = self._sandbox.url
        environ = {"XAI_PROXY_ISSUER": issuer, "XAI_PROXY_UPSTREAM": issuer, **environ}
        name = f"agent-{self._pods}"
        pod = manifest.adapted(self._objects["Deployment"], name, self._ports, environ)
        began = time.monotonic()
        self._pod = self._cluster.create(pod)
        self._pod.wait_until_started()
        self._started_after = time.monotonic() - began
        return self._pod

    def end(self) -> None:
        """End the pod, if one runs."""
        if self._pod:
            self._pod.end()
            self._pod = None

    def prepare(self) -> None:
        """Start a pod whose volume has a login, for steps that do not begin with one."""
        self._sandbox.write_login(self._tokens)
        for path in (self._tokens.parent, self._tokens):
            shutil.chown(path, manifest.UID, manifest.UID)
        self._start()

    # The login

    def _login(self) -> dict[str, Any]:
        found = json.loads(self._tokens.read_bytes())
        assert isinstance(found, dict)
        return found

    def _assert_alive(self) -> float:
        """The login is refreshed and used, and no refresh token was spent twice. Return the seconds
        until the next refresh.
        """
        began = time.monotonic()
        before = self._login()["refresh_token"]
        wait(lambda: self._login()["refresh_token"] != before, REFRESH, "a refresh")
        seconds = time.monotonic() - began
        wait(self._serves, REFRESH, "a request is served")
        assert self._sandbox.counters()["reuses"] == 0, "a spent refresh token was sent"
        return seconds

    def _serves(self) -> bool:
        # A container that was killed may not listen yet.
        with contextlib.suppress(ConnectionRefusedError):
            return load.ask(self.port) == 200
        return False

    def _hold_refresh(self, **answer: Any) -> None:
        """Have the token endpoint withhold its next response to a refresh, and wait for one."""
        self._sandbox.set(
            answers=[
                {
                    "path": "/oauth2/token",
                    "grant_type": "refresh_token",
                    "times": 1,
                    "delay": DELAY,
                    **answer,
                }
            ]
        )
        wait(
            lambda: not self._sandbox.get("/_sandbox/knobs")[1]["answers"],
            REFRESH,
            "a request for a refresh",
        )

    # The steps

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("start without a login", self.step_sign_in),
            ("start with a seed", self.step_seed),
            ("restart, the Secret still there", self.step_restart_with_secret),
            ("restart, the Secret deleted", self.step_restart_without_secret),
            ("node change", self.step_node_change),
            ("SIGTERM in the middle of a refresh", self.step_terminated_refresh),
            (
                "kill -9 of the refresher, nothing spent",
                lambda: self._kill("xai-refresher", KILLS, REFUSAL),
            ),
            (
                "kill -9 of the refresher, token spent",
                lambda: self._kill("xai-refresher", KILLS, {}, grace=600),
            ),
            (
                "kill -9 of the container, nothing spent",
                lambda: self._kill("", 1, REFUSAL),
            ),
            (
                "kill -9 of the container, token spent",
                lambda: self._kill("", 1, {}, grace=600),
            ),
            ("the same, at an issuer without grace", self.step_no_grace),
            ("SIGTERM under load", lambda: self._terminate(0)),
            (
                f"SIGTERM under load, DRAIN_DELAY={DRAIN_DELAY}",
                lambda: self._terminate(DRAIN_DELAY),
            ),
            ("memory", self.step_memory),
        ]

    def step_sign_in(self) -> str:
        self.end()
        self._volume = self._new_volume()
        pod = self._start()
        status = load.ask(self.port, "/readyz")
        assert status == 503, f"/readyz is {status} without a login"
        done = pod.execute("xai-login", "--device")
        assert done.returncode == 0, done.stderr
        assert load.ask(self.port) == 200
        assert "may be written by other users" not in pod.log()
        paths = self._volume, self._tokens.parent, self._tokens
        modes = [oct(path.stat().st_mode & 0o7777)[2:] for path in paths]
        return (
            f"pod started after {self._started_after:.0f} s; signed in in the container; "
            f"modes of the volume, the folder and the login: {', '.join(modes)}"
        )

    def step_seed(self) -> str:
        self.end()
        self._volume = self._new_volume()
        seed = self._folder / "elsewhere/tokens.json"
        self._sandbox.write_login(seed)
        self._seed = json.loads(seed.read_bytes())["refresh_token"]
        content = base64.b64encode(seed.read_bytes()).decode()
        secret = {"metadata": {"name": SEED}, "data": {"tokens.json": content}}
        self._cluster.ask("POST", SECRETS, {"apiVersion": "v1", "kind": "Secret", **secret})
        pod = self._start()
        assert "the seed is in use" in pod.log("seed")
        self._assert_alive()
        return f"copied, used and refreshed; pod started after {self._started_after:.0f} s"

    def step_restart_with_secret(self) -> str:
        seconds = self.pod.end()
        login = self._login()["refresh_token"]
        assert login != self._seed
        pod = self._start()
        assert "the seed is not used" in pod.log("seed")
        self._assert_alive()
        return f"the spent token was not put back; the old pod ended after {seconds:.0f} s"

    def step_restart_without_secret(self) -> str:
        self._cluster.ask("DELETE", f"{SECRETS}/{SEED}")
        self.end()
        self._start()
        self._assert_alive()
        return "not needed: used and refreshed"

    def step_node_change(self) -> str:
        self.end()
        former = self._volume
        self._volume = self._new_volume()
        shutil.copytree(former, self._volume, dirs_exist_ok=True)
        for path in [self._volume, *self._volume.rglob("*")]:
            there = (former / path.relative_to(self._volume)).stat()
            shutil.chown(path, there.st_uid, there.st_gid)
        shutil.rmtree(former)
        self._start()
        self._assert_alive()
        return "another volume with these files, another pod: used and refreshed"

    def step_terminated_refresh(self) -> str:
        self._hold_refresh()
        seconds = self.pod.end()
        assert self._sandbox.counters()["reuses"] == 0
        self._start()
        self._assert_alive()
        return f"the response was saved before the pod ended, after {seconds:.0f} s"

    def _kill(self, name: str, times: int, answer: dict[str, Any], grace: int = 0) -> str:
        """Kill a process of the container in the middle of a refresh. `name`: empty for the first."""
        self._sandbox.set(grace=grace)
        longest = 0.0
        for _ in range(times):
            self._hold_refresh(**answer)
            self.pod.kill(self.pod.process(name) if name else self.pod.pid())
            longest = max(longest, self._assert_alive())
        restarts = self.pod.proxy()["restartCount"]
        self._sandbox.set(grace=0)
        return (
            f"{times} of {times} logins survived; the next refresh {longest:.1f} s after the kill "
            f"at most; restarts of the container: {restarts}"
        )

    def step_no_grace(self) -> str:
        """The one loss that no program on this side can prevent, and the way out of it."""
        self._hold_refresh()
        self.pod.kill(self.pod.process("xai-refresher"))
        wait(lambda: load.ask(self.port, "/readyz") == 503, REFRESH, "/readyz is 503")
        reuses = self._sandbox.counters()["reuses"]
        assert reuses == 1, f"a spent refresh token was sent {reuses} times"
        done = self.pod.execute("xai-login", "--device")
        assert done.returncode == 0, done.stderr
        assert load.ask(self.port) == 200
        self._sandbox.reset()
        self._assert_alive()
        return "signed out (docs/login-safety.md, property 3); signed in again in the running pod"

    def _terminate(self, delay: int) -> str:
        """SIGTERM with streams open and clients that go on opening connections."""
        self.end()
        self._start(XAI_PROXY_DRAIN_DELAY=str(delay))
        # Streams of six seconds.
        self._sandbox.set(events=30, events_per_second=5)
        streams = load.Streams(self.port, 20)
        wait(lambda: streams.begun == 20, 20, "streams")
        newcomers = load.Newcomers(self.port, 4)
        wait(lambda: newcomers.outcomes["ok"] > 20, 20, "requests")
        self.pod.terminate()
        self.pod.wait_for_log("until then new connections" if delay else "stopping; ")
        began = time.monotonic()
        wait(lambda: time.monotonic() > began + ROUTED, ROUTED + 1, "the endpoint is withdrawn")
        newcomers.end()
        seconds = self.pod.ended()
        streams.end()
        self._pod = None
        self._sandbox.reset()
        outcomes = newcomers.outcomes
        lost = outcomes.total() - outcomes["ok"]
        assert streams.complete == 20, f"{streams.complete} of 20 streams were complete"
        assert not lost if delay else lost, dict(outcomes)
        return (
            f"of {outcomes.total()} requests on new connections until {ROUTED} s after SIGTERM "
            f"{outcomes['refused']} refused, {lost - outcomes['refused']} otherwise lost; "
            f"20 of 20 open streams complete; the pod ended {seconds:.0f} s later"
        )

    def step_memory(self) -> str:
        pod = self._pod or self._start()
        group = memory.Group(pod.pid())
        limit = group.limit() >> 20
        figures = {}
        with memory.observed(group) as peak:
            self._assert_alive()
        figures["idle"] = peak.mib
        with memory.observed(group) as peak:
            self._sandbox.set(events=50, events_per_second=10)
            streams = load.Streams(self.port, 200)
            streams.end()
        assert streams.complete == 200
        figures["200 streams"] = peak.mib
        with memory.observed(group) as peak:
            self._fill()
        figures["and replay memory full, large responses"] = peak.mib
        assert pod.proxy()["restartCount"] == 0, "the container was restarted"
        most = max(figures.values())
        assert most < 0.8 * limit, f"{most:.0f} MiB of {limit}"
        text = "; ".join(f"{name}: {mib:.0f} MiB" for name, mib in figures.items())
        return f"{text}; of {limit} MiB"

    def _fill(self) -> None:
        """Beside 200 streams, have twice as many bytes of requests in flight as the replay memory
        holds, and 128 responses that are kept for their usage; then read responses of 64 MiB.
        """
        streams = load.Streams(self.port, 200)
        wait(lambda: streams.begun == 200, 30, "streams")
        requests, responses = "/v1/responses", "/v1/chat/completions"
        # Each response is short enough to be kept whole until its usage is read.
        self._sandbox.set(
            events=1,
            event_size=1000 << 10,
            answers=[{"path": requests, "times": 8, "delay": 5}],
        )
        statuses: list[int] = []
        large: dict[str, object] = {"model": "grok-4.5", "input": "x" * (8 * memory.MIB)}

        def ask(path: str, body: dict[str, object]) -> None:
            statuses.append(load.post(self.port, path, body)[0])

        with (
            load.together(8, lambda: ask(requests, large)),
            load.together(128, lambda: ask(responses, load.CHAT)),
        ):
            pass
        assert statuses == [200] * 136, statuses
        self._sandbox.set(events=64, event_size=1 << 20)
        sizes: list[int] = []
        with load.together(
            8, lambda: sizes.append(len(load.post(self.port, responses, load.CHAT)[1]))
        ):
            pass
        assert min(sizes) > 64 * memory.MIB
        streams.end()
        self._sandbox.reset()


def play(
    programs: pathlib.Path,
    image: pathlib.Path,
    folder: pathlib.Path,
    only: str,
    report: Callable[[str, bool, str], None],
) -> None:
    with contextlib.ExitStack() as stack:
        (folder / "cluster").mkdir()
        cluster = stack.enter_context(Cluster(programs, folder / "cluster", image))
        sandbox = Sandbox(access_token_lifetime=LIFETIME, device_interval=1, auto_approve=0)
        played = Play(cluster, stack.enter_context(sandbox), folder)
        run(played.steps(), played.prepare, only, report)
        played.end()
        sandbox = Sandbox(
            access_token_lifetime=shared_play.LIFETIME, device_interval=1, auto_approve=0
        )
        shared = shared_play.SharedPlay(cluster, stack.enter_context(sandbox), folder)
        shared.apply()
        run(shared.steps(), shared.prepare, only, report)


def run(
    steps: list[tuple[str, Callable[[], str]]],
    prepare: Callable[[], None],
    only: str,
    report: Callable[[str, bool, str], None],
) -> None:
    """Run the steps whose names match `only`. `prepare`: in place of the first one."""
    chosen = [(name, step) for name, step in steps if re.search(only, name)]
    if chosen and chosen[0] != steps[0]:
        prepare()
    for name, step in chosen:
        try:
            report(name, True, step())
        except (AssertionError, OSError) as error:
            report(name, False, str(error))

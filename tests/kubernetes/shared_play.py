"""The steps of the play with one login for several proxies, in the order of their lives.

Each method `step_...` returns what was seen, and fails an assertion if the login or a request was
lost.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from sandbox import Sandbox

from . import load, manifest, memory, shared_manifest
from .cluster import MERGE, SECRETS, Cluster, Pod, wait

# Seconds of an access token: half of it is more than a kubelet takes to mount a new one.
LIFETIME = 200
PROXIES = 3
ROTATIONS = 2
# Seconds for the next refresh, and for the next mount.
REFRESH, MOUNT = LIFETIME, 150
# Seconds between two requests of a client.
PAUSE = 0.2
# Seconds after SIGTERM for which requests still arrive.
ROUTED = 2
RBAC = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
PATHS = {
    "Secret": SECRETS,
    "ServiceAccount": "/api/v1/namespaces/default/serviceaccounts",
    "Role": f"{RBAC}/roles",
    "RoleBinding": f"{RBAC}/rolebindings",
    "ConfigMap": "/api/v1/namespaces/default/configmaps",
}


class SharedPlay:
    def __init__(self, cluster: Cluster, sandbox: Sandbox, folder: pathlib.Path):
        self._cluster = cluster
        self._sandbox = sandbox
        self._objects = shared_manifest.objects()
        self._volume = folder / "shared-volume"
        self._volume.mkdir()
        self._ask_port = load.free_ports()[0]
        self._environ = {"XAI_PROXY_ISSUER": sandbox.url, "XAI_PROXY_UPSTREAM": sandbox.url}
        self._refresher: Pod | None = None
        self._proxies: dict[Pod, tuple[int, int]] = {}
        self._key = ""

    # Objects and pods

    def apply(self) -> None:
        """The objects that `kubectl apply -k` creates, without those that need a controller."""
        authority = {"ca.crt": self._cluster.ca.read_text()}
        # Made in each namespace by a controller.
        self._create({"kind": "ConfigMap", "data": authority, **named("kube-root-ca.crt")})
        for kind in ("Secret", "ServiceAccount", "Role", "RoleBinding"):
            for (of, _), each in self._objects.items():
                if of == kind:
                    self._create(each)
        claim = shared_manifest.claim(self._objects)
        self._cluster.bind(claim, manifest.volume(self._volume))

    def _create(self, each: dict[str, Any]) -> None:
        self._cluster.ask("POST", PATHS[each["kind"]], {"apiVersion": "v1", **each})

    def _start_refresher(self) -> Pod:
        name = f"{shared_manifest.REFRESHER}-0"
        pod = shared_manifest.refresher(
            self._objects, self._cluster, name, self._ask_port, self._environ
        )
        self._refresher = self._cluster.create(pod, "refresher")
        self._refresher.wait_until_started()
        return self._refresher

    def _start_proxy(self) -> Pod:
        ports = load.free_ports()
        name = f"{shared_manifest.PROXY}-{len(self._proxies)}"
        pod = shared_manifest.proxy(self._objects, name, ports, self._ask_port, self._environ)
        started = self._cluster.create(pod)
        self._proxies[started] = ports
        started.wait_until_started()
        return started

    @property
    def refresher(self) -> Pod:
        assert self._refresher is not None
        return self._refresher

    def prepare(self) -> None:
        self.step_sign_in()
        self.step_proxies()

    # The login

    def _login(self) -> dict[str, Any]:
        """The login on the volume of the refresher."""
        found = json.loads((self._volume / "login/tokens.json").read_bytes())
        assert isinstance(found, dict)
        return found

    def _secret(self) -> dict[str, Any]:
        found = self._cluster.ask("GET", f"{SECRETS}/{shared_manifest.LOGIN}")
        assert isinstance(found, dict)
        return found

    def _published(self) -> dict[str, Any]:
        content = base64.b64decode((self._secret().get("data") or {}).get("tokens.json", ""))
        return json.loads(content or "{}")

    def _mounted(self, pod: Pod) -> dict[str, Any]:
        """The token file of a proxy, or {} where the kubelet has mounted an empty Secret."""
        try:
            return json.loads(pod.file("/login/tokens.json").read_bytes())
        except FileNotFoundError:
            return {}

    def _has(self, pod: Pod, token: str) -> bool:
        return self._mounted(pod).get("access_token") == token

    def _wait_until_mounted(self) -> None:
        """Wait until each proxy has the current token, which may be renewed meanwhile."""
        for pod in self._proxies:
            wait(lambda: self._has(pod, self._login()["access_token"]), MOUNT, "it is mounted")

    def _served(self, ports: tuple[int, int]) -> bool:
        return load.ask(ports[0], key=self._key) == 200

    @contextlib.contextmanager
    def _clients(self) -> Iterator[list[load.Newcomers]]:
        clients = [
            load.Newcomers(port, 1, self._key, PAUSE) for port, _admin in self._proxies.values()
        ]
        try:
            yield clients
        finally:
            for each in clients:
                each.end()

    # The steps

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("shared: sign in", self.step_sign_in),
            ("shared: proxies", self.step_proxies),
            ("shared: rotations", self.step_rotations),
            ("shared: another refresher pod", self.step_replace),
            ("shared: the Secret is replaced", self.step_overwritten),
            ("shared: the token is refused early", self.step_refused),
            ("shared: memory of a proxy", self.step_memory),
            ("shared: SIGTERM of a proxy under load", self.step_terminate),
        ]

    def step_sign_in(self) -> str:
        """As docs/kubernetes.md has it: sign in, and make a client key, in the refresher's pod."""
        pod = self._start_refresher()
        status = load.ask(self._ask_port, "/readyz")
        assert status == 503, f"/readyz is {status} without a login"
        done = pod.execute("xai-login", "--device")
        assert done.returncode == 0, done.stderr
        began = time.monotonic()
        wait(self._published, 20, "the token is in the Secret")
        seconds = time.monotonic() - began
        login, published = self._login(), self._published()
        assert published["access_token"] == login["access_token"]
        assert "refresh_token" not in published
        assert login["refresh_token"] not in json.dumps(self._secret())
        done = pod.execute("xai-client-key", "add", "agents")
        assert done.returncode == 0, done.stderr
        self._key = done.stdout.strip().splitlines()[-1].strip()
        keys = base64.b64encode((self._volume / "login/client-keys").read_bytes()).decode()
        self._create(
            {"kind": "Secret", "data": {"client-keys": keys}, **named(shared_manifest.KEYS)}
        )
        wait(lambda: load.ask(self._ask_port, "/readyz") == 200, 20, "the refresher is ready")
        return f"published {seconds:.1f} s after the login, without the refresh token"

    def step_proxies(self) -> str:
        began = time.monotonic()
        for _ in range(PROXIES):
            pod = self._start_proxy()
            ports = self._proxies[pod]
            wait(lambda: self._served(ports), 20, "a request is served")
            assert load.ask(ports[0]) == 401, "a request without a client key was served"
            done = pod.execute("sh", "-c", "stat -Lc '%a %u:%g' /login/* && ! touch /login/x")
            assert done.returncode == 0, done.stdout + done.stderr
            modes = done.stdout.strip()
            assert modes == f"440 0:{manifest.UID}", modes
            assert not pod.file(shared_manifest.ACCOUNT).exists()
            assert "refresh_token" not in self._mounted(pod)
        seconds = time.monotonic() - began
        return (
            f"{PROXIES} serve, {seconds / PROXIES:.0f} s after their creation; mounted {modes}, "
            "read-only, without a service account"
        )

    def step_rotations(self) -> str:
        """Requests all the time, until each proxy has mounted several tokens."""
        delays: list[float] = []
        published: list[float] = []
        with self._clients() as clients:
            for _ in range(ROTATIONS):
                saved, delay, seconds = self._rotation()
                published.append(saved)
                delays += seconds
                assert delay < 5, f"a mounted token was used only after {delay:.1f} s"
        self._assert_nothing_lost(clients)
        count = sum(each.outcomes.total() for each in clients)
        return (
            f"{ROTATIONS} refreshes; in the Secret after {max(published):.1f} s at most; mounted after "
            f"{', '.join(f'{each:.0f}' for each in sorted(delays))} s; {count} requests, none lost"
        )

    def _rotation(self) -> tuple[float, float, list[float]]:
        """Wait for a refresh, and follow its token. Return the seconds from the volume to the Secret,
        from a mount to the proxy's use of it at most, and from the Secret to each mount.
        """
        former = self._login()["access_token"]
        wait(lambda: self._login()["access_token"] != former, REFRESH, "a refresh")
        saved, token = time.monotonic(), self._login()["access_token"]
        wait(lambda: self._published()["access_token"] == token, 20, "it is in the Secret")
        published = time.monotonic()
        waiting, delays, used = set(self._proxies), [], 0.0
        while waiting:
            assert time.monotonic() < published + MOUNT, f"not mounted within {MOUNT} s"
            for pod in [pod for pod in waiting if self._has(pod, token)]:
                waiting.remove(pod)
                mounted = time.monotonic()
                delays.append(mounted - published)
                wait(lambda: self._uses(pod, token), 10, "the proxy uses it")
                used = max(used, time.monotonic() - mounted)
            time.sleep(0.1)
        return published - saved, used, delays

    def _uses(self, pod: Pod, token: str) -> bool:
        """Whether a request through the proxy arrives upstream with this access token."""
        path = f"/v1/models?through={pod.name}"
        load.ask(self._proxies[pod][0], path, self._key)
        digest = hashlib.sha256(token.encode()).hexdigest()
        *_, seen = self._sandbox.requests(path)
        return ["Authorization", f"Bearer {digest}"] in seen["headers"]

    def _assert_nothing_lost(self, clients: list[load.Newcomers]) -> None:
        for each in clients:
            assert set(each.outcomes) == {"ok"}, dict(each.outcomes)
        assert self._sandbox.counters()["reuses"] == 0, "a spent refresh token was sent"

    def step_replace(self) -> str:
        former = self.refresher.uid
        with self._clients() as clients:
            seconds = self.refresher.end()
            self._start_refresher()
            token = self._login()["refresh_token"]
            wait(lambda: self._login()["refresh_token"] != token, REFRESH, "a refresh")
            login = self._login()["access_token"]
            wait(lambda: self._published()["access_token"] == login, 20, "it is in the Secret")
        claim = self._secret()["metadata"]["annotations"]["xaiproxy/spends"]
        assert claim.endswith(self.refresher.uid) and former != self.refresher.uid, claim
        self._assert_nothing_lost(clients)
        return (
            f"the old pod ended after {seconds:.0f} s; the new one claimed, refreshed and published"
        )

    def step_overwritten(self) -> str:
        """What `kubectl replace` with the manifest would do: a kubelet may mount the empty Secret."""
        with self._clients() as clients:
            self._cluster.ask("PATCH", f"{SECRETS}/{shared_manifest.LOGIN}", {"data": None}, MERGE)
            began = time.monotonic()
            wait(self._published, 90, "the token is in the Secret again")
            seconds = time.monotonic() - began
            self._wait_until_mounted()
            for ports in self._proxies.values():
                wait(lambda: self._served(ports), 10, "a request is served")
            longest = time.monotonic() - began
        failed = sum(each.outcomes.total() - each.outcomes["ok"] for each in clients)
        return (
            f"published again after {seconds:.0f} s, and mounted everywhere after {longest:.0f} s; "
            f"{failed} requests failed meanwhile"
        )

    def step_refused(self) -> str:
        """Until each proxy serves again, from the moment at which the API refuses the token."""
        # A token that is not renewed meanwhile.
        self._sandbox.set(access_token_lifetime=3600)
        token = self._login()["access_token"]
        wait(lambda: self._login()["access_token"] != token, REFRESH, "a refresh")
        self._wait_until_mounted()
        refreshes = self._sandbox.counters()["refreshes"]
        with self._clients() as clients:
            began = time.monotonic()
            self._sandbox.kill()
            waiting, outages = dict(self._proxies), []
            time.sleep(1)
            ready = {load.ask(admin, "/readyz") for _, admin in self._proxies.values()}
            while waiting:
                assert time.monotonic() < began + MOUNT, f"not served within {MOUNT} s"
                for pod, ports in list(waiting.items()):
                    if self._served(ports):
                        del waiting[pod]
                        outages.append(time.monotonic() - began)
                time.sleep(0.2)
        statuses = set().union(*(each.outcomes for each in clients))
        assert statuses <= {"ok", "503"}, statuses
        assert ready == {200}, f"/readyz was {ready}"
        count = self._sandbox.counters()["refreshes"] - refreshes
        assert count == 1, f"{count} refreshes"
        return (
            f"one refresh; 503 until it was mounted, after "
            f"{', '.join(f'{each:.0f}' for each in sorted(outages))} s; /readyz 200 meanwhile"
        )

    def step_memory(self) -> str:
        pod, (port, _admin) = next(iter(self._proxies.items()))
        group = memory.Group(pod.pid())
        figures = {"idle": group.working_set() / memory.MIB}
        with memory.observed(group) as peak:
            self._sandbox.set(events=50, events_per_second=10)
            streams = load.Streams(port, 200, self._key)
            streams.end()
        self._sandbox.reset()
        assert streams.complete == 200
        figures["200 streams"] = peak.mib
        refresher = memory.Group(self.refresher.pid())
        figures["the refresher"] = refresher.working_set() / memory.MIB
        text = "; ".join(f"{name}: {mib:.0f} MiB" for name, mib in figures.items())
        return f"{text}; of {group.limit() >> 20} and {refresher.limit() >> 20} MiB"

    def step_terminate(self) -> str:
        """The settings of the manifest: new connections are served until the drain begins."""
        pod, (port, _admin) = self._proxies.popitem()
        self._sandbox.set(events=100, events_per_second=5)
        streams = load.Streams(port, 20, self._key)
        wait(lambda: streams.begun == 20, 20, "streams")
        newcomers = load.Newcomers(port, 4, self._key)
        wait(lambda: newcomers.outcomes.total() > 20, 20, "requests")
        pod.terminate()
        pod.wait_for_log("until then new connections")
        began = time.monotonic()
        wait(lambda: time.monotonic() > began + ROUTED, ROUTED + 1, "the endpoint is withdrawn")
        newcomers.end()
        seconds = pod.ended()
        streams.end()
        self._sandbox.reset()
        assert streams.complete == 20, f"{streams.complete} of 20 streams were complete"
        assert set(newcomers.outcomes) == {"ok"}, dict(newcomers.outcomes)
        return (
            f"of {newcomers.outcomes.total()} requests on new connections until {ROUTED} s after "
            f"SIGTERM none lost; 20 of 20 open streams complete; the pod ended {seconds:.0f} s later"
        )


def named(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name}}

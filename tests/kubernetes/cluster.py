"""An API server and a kubelet, and the pods that they run."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import requests

START = 180  # seconds for a pod to start
END = 150  # seconds for a pod to end, after its grace period of 90 s
PODS = "/api/v1/namespaces/default/pods"
CLAIMS = "/api/v1/namespaces/default/persistentvolumeclaims"
SECRETS = "/api/v1/namespaces/default/secrets"
VOLUMES = "/api/v1/persistentvolumes"
MERGE = "application/merge-patch+json"


def wait(happened: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while not (outcome := happened()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.05)
    return outcome


class Cluster:
    """`programs`: the folder of the programs `up`, `node` and `down`."""

    def __init__(self, programs: pathlib.Path, folder: pathlib.Path, image: pathlib.Path):
        self._programs = programs
        self.folder = folder
        self._image = image
        self._claim: dict[str, Any] = {}
        self._volumes = 0

    def __enter__(self) -> Cluster:
        try:
            settings = self._run("up", self.folder) + self._run("node", self.folder, self._image)
        except BaseException:
            self.__exit__()
            raise
        environ = dict(line.split("=", 1) for line in shlex.split(settings))
        self.url = environ["KUBE_URL"]
        self.ca = pathlib.Path(environ["KUBE_CA"])
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = environ["KUBE_CA"]
        self._session.headers["Authorization"] = f"Bearer {environ['KUBE_ADMIN_TOKEN']}"
        return self

    def __exit__(self, *_error: object) -> None:
        self._run("down", self.folder)

    def _run(self, program: str, *arguments: pathlib.Path) -> str:
        command = [self._programs / program, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=180)
        if done.returncode:
            raise AssertionError(f"{program} ended with {done.returncode}")
        # `node` prints what `ctr` imported, too.
        return "\n".join(line for line in done.stdout.splitlines() if line.startswith("KUBE_"))

    def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        """The object in the response, or None if it is 404."""
        answer = self._session.request(
            method,
            self.url + path,
            data=None if body is None else json.dumps(body),
            headers={"Content-Type": kind},
            timeout=30,
        )
        if answer.status_code == 404:
            return None
        if not answer.ok:
            raise AssertionError(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json()

    def bind(self, claim: dict[str, Any], volume: dict[str, Any]) -> None:
        """Create a claim and its volume, in place of those before, as their controllers do."""
        for path in (f"{CLAIMS}/{claim['metadata']['name']}", f"{VOLUMES}/volume-{self._volumes}"):
            if self.ask("GET", path):
                self.ask("DELETE", path)
                self.ask("PATCH", path, {"metadata": {"finalizers": None}}, MERGE)
                wait(lambda: self.ask("GET", path) is None, 10, f"{path} is deleted")
        self._volumes += 1
        name = f"volume-{self._volumes}"
        claim = {**claim, "spec": {**claim["spec"], "volumeName": name}}
        created = self.ask("POST", CLAIMS, claim)["metadata"]
        volume["metadata"]["name"] = name
        volume["spec"]["claimRef"] = {
            "kind": "PersistentVolumeClaim",
            "namespace": "default",
            "name": created["name"],
            "uid": created["uid"],
        }
        self.ask("POST", VOLUMES, volume)
        bound = {"status": {"phase": "Bound"}}
        for path in (f"{VOLUMES}/{name}", f"{CLAIMS}/{created['name']}"):
            self.ask("PATCH", f"{path}/status", bound, MERGE)

    def create(self, manifest: dict[str, Any], container: str = "xaiproxy") -> Pod:
        self.ask("POST", PODS, manifest)
        return Pod(self, manifest["metadata"]["name"], container)

    def tasks(self) -> Iterator[tuple[str, int]]:
        """The identity and the first process of each running container."""
        for line in self.ctr("tasks", "ls").stdout.splitlines()[1:]:
            identity, pid, *_status = line.split()
            yield identity, int(pid)

    def ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        socket = self.folder / "containerd/c.sock"
        command = ["ctr", "--address", str(socket), "--namespace", "k8s.io", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)


class Pod:
    """`container`: the one of the proxy, or of the refresher."""

    def __init__(self, cluster: Cluster, name: str, container: str):
        self._cluster = cluster
        self.name = name
        self._container = container
        self.uid: str = cluster.ask("GET", f"{PODS}/{name}")["metadata"]["uid"]
        self._commands = 0

    def status(self) -> dict[str, Any]:
        found = self._cluster.ask("GET", f"{PODS}/{self.name}")["status"]
        assert isinstance(found, dict)
        return found

    def containers(self) -> list[dict[str, Any]]:
        return self.status().get("containerStatuses") or [{}]

    def wait_until_started(self) -> None:
        """Wait until all containers have passed their startup probes.

        This kubelet may notice only at its next sync, after a minute, that they are ready, too.
        """
        try:
            wait(lambda: all(each.get("started") for each in self.containers()), START, "its start")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.status()}\n{self.log()}") from None

    def proxy(self) -> dict[str, Any]:
        """The status of the container."""
        (found,) = (each for each in self.containers() if each["name"] == self._container)
        return found

    def file(self, path: str) -> pathlib.Path:
        """A file of the container, as this machine sees it."""
        return pathlib.Path(f"/proc/{self.pid()}/root{path}")

    def identity(self) -> str:
        return str(self.proxy()["containerID"]).removeprefix("containerd://")

    def pid(self) -> int:
        """The first process of the container."""
        return dict(self._cluster.tasks())[self.identity()]

    def processes(self) -> dict[int, str]:
        """The processes of the container, and their command lines."""
        found = {}
        for pid in [self.pid(), *descendants(self.pid())]:
            line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            found[pid] = line.decode()
        return found

    def process(self, name: str) -> int:
        (found,) = (pid for pid, line in self.processes().items() if name in line)
        return found

    def log(self, container: str = "") -> str:
        pods = pathlib.Path("/var/log/pods")
        folder = pods / f"default_{self.name}_{self.uid}" / (container or self._container)
        return "".join(path.read_text() for path in sorted(folder.glob("*.log")))

    def wait_for_log(self, text: str, seconds: float = START) -> None:
        wait(lambda: text in self.log(), seconds, f"{text!r} in the log")

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as its user."""
        self._commands += 1
        name = f"command-{self._commands}"
        return self._cluster.ctr("tasks", "exec", "--exec-id", name, self.identity(), *command)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Delete the pod; return when the API server has the request."""
        self._cluster.ask("DELETE", f"{PODS}/{self.name}")

    def ended(self) -> float:
        """Wait until the pod is gone. Return the seconds that it took."""
        began = time.monotonic()
        path = f"{PODS}/{self.name}"
        wait(lambda: self._cluster.ask("GET", path) is None, END, f"{self.name} ends")
        return time.monotonic() - began

    def end(self) -> float:
        self.terminate()
        return self.ended()


def descendants(pid: int) -> list[int]:
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, children) for each in [child, *descendants(child)]]

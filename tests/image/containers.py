"""Containers of one image, in a containerd that is started for them and ends with them."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import threading
import time
from typing import Any

PROGRAMS = {"containerd": "containerd", "ctr": "containerd", "runc": "runc"}
NAME = "localhost/xaiproxy:checked"
# What a container may do by default.
CAPABILITIES = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SYS_CHROOT",
    "MKNOD",
    "AUDIT_WRITE",
    "SETFCAP",
]
CONFIGURATION = """\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{socket}"
"""
TIMEOUT = 60  # seconds


def missing() -> str:
    """Why containers cannot be run here, or ""."""
    packages = {package for name, package in PROGRAMS.items() if not shutil.which(name)}
    if packages:
        return f"missing {' and '.join(sorted(packages))}; on Debian: apt-get install them"
    return "" if os.getuid() == 0 else "containerd needs root"


class Container:
    """A running container. `lines`: its output so far, completed by `ended`."""

    def __init__(self, containerd: Containerd, name: str, command: list[str | pathlib.Path]):
        self.name = name
        self._containerd = containerd
        self._pid_file = containerd.folder / f"{name}.pid"
        self.lines: list[str] = []
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            [*containerd.ctr, "run", "--pid-file", self._pid_file, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line)

    @property
    def pid(self) -> int:
        return int(self._pid_file.read_text())

    def wait_for(self, pattern: str, seconds: float = TIMEOUT) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if match := re.search(pattern, "".join(self.lines)):
                return match
            time.sleep(0.05)
        raise AssertionError(f"{self.name}: no {pattern!r} in {self.lines[-10:]}")

    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started

    def executing(self, *command: str) -> subprocess.Popen[str]:
        """A command in the container, as its user."""
        identity = self._containerd.new_id()
        return subprocess.Popen(
            [*self._containerd.ctr, "task", "exec", "--exec-id", identity, self.name, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def execute(self, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command to its end. `text`: its standard input."""
        process = self.executing(*command)
        output, errors = process.communicate(text, timeout=TIMEOUT)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self, seconds: float = TIMEOUT) -> int:
        """The exit status."""
        code = self.process.wait(seconds)
        self._reader.join()
        return code

    def kill(self) -> None:
        """End it, if it runs."""
        if self.process.poll() is None:
            subprocess.run(
                [*self._containerd.ctr, "task", "kill", "--signal", "SIGKILL", self.name],
                capture_output=True,
            )
            self.ended()


class Containerd:
    def __init__(self, folder: pathlib.Path, archive: pathlib.Path):
        self.folder = folder / "containerd"
        self.folder.mkdir()
        socket = self.folder / "socket"
        # Names of cgroups contain the namespace, also those of another containerd.
        self.ctr = ["ctr", "--address", str(socket), "--namespace", f"image-check-{os.getpid()}"]
        self._archive = archive
        self._ids = 0
        self._containers: list[Container] = []
        configuration = self.folder / "config.toml"
        configuration.write_text(CONFIGURATION.format(folder=self.folder, socket=socket))
        with open(self.folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                ["containerd", "--config", configuration],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Containerd:
        try:
            self._import()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _import(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while subprocess.run([*self.ctr, "version"], capture_output=True).returncode:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise AssertionError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.1)
        arguments = ["images", "import", "--snapshotter", "native", self._archive]
        done = subprocess.run([*self.ctr, *arguments], check=True, capture_output=True, text=True)
        name = re.findall(r"unpacking (\S+)", done.stdout)[0]
        if name != NAME:
            tag = ["images", "tag", name, NAME]
            subprocess.run([*self.ctr, *tag], check=True, capture_output=True)

    def __exit__(self, *_error: object) -> None:
        for container in self._containers:
            container.kill()
        self._process.terminate()
        self._process.wait(TIMEOUT)

    def new_id(self) -> str:
        self._ids += 1
        return f"exec{self._ids}"

    def run(
        self,
        name: str,
        *command: str,
        data: pathlib.Path,
        network_of: Container | None = None,
        memory: int = 0,
        **environ: str,
    ) -> Container:
        """Start a container with a read-only root file system and no capabilities.

        `data`: the folder that is mounted at /data
        `network_of`: the container whose network it joins; without it, it has loopback alone
        `memory`: MiB
        """
        options = ["--rm", "--snapshotter", "native", "--runc-root", str(self.folder / "runc")]
        options += ["--read-only", "--seccomp"]
        options += [f"--cap-drop=CAP_{name}" for name in CAPABILITIES]
        options += ["--mount", f"type=bind,src={data},dst=/data,options=rbind:rw"]
        options += [f"--env={name}={value}" for name, value in environ.items()]
        if network_of:
            options.append(f"--with-ns=network:/proc/{network_of.pid}/ns/net")
        if memory:
            options.append(f"--memory-limit={memory * 2**20}")
        container = Container(self, name, [*options, NAME, name, *command])
        self._containers.append(container)
        return container


def most_memory(container: Container) -> float:
    """MiB that the container's processes and their files had at most."""
    groups = dict(
        line.split(":", 2)[1:]
        for line in pathlib.Path(f"/proc/{container.pid}/cgroup").read_text().splitlines()
    )
    if "memory" in groups:
        path = f"/sys/fs/cgroup/memory{groups['memory']}/memory.max_usage_in_bytes"
    else:
        path = f"/sys/fs/cgroup{groups['']}/memory.peak"
    return int(pathlib.Path(path).read_text()) / 2**20


def status(pid: int) -> dict[str, Any]:
    """The fields of /proc/PID/status."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, value in (line.split(":", 1) for line in lines)}


def child(pid: int, name: str) -> int:
    """The child of `pid` whose command line has `name`."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    [found] = [
        int(number)
        for number in children
        if name.encode() in pathlib.Path(f"/proc/{number}/cmdline").read_bytes()
    ]
    return found

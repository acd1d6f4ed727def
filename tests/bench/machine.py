"""This machine: what the benchmark needs installed, its two cores, and what processes cost."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
# What is compiled and installed for the benchmark. It may be removed at any time.
FOLDER = ROOT / ".bench"
SOURCES = pathlib.Path(__file__).parent
# The core of the proxy that is measured; that of load client and upstream.
TARGET_CORE, OTHER_CORE = 0, 1
# EX_UNAVAILABLE of sysexits.h
UNAVAILABLE = 69

# What must be installed, and the Debian package that has it.
DEBIAN = {
    "nginx": "nginx",
    "gcc": "gcc",
    "openssl": "openssl",
    "taskset": "util-linux",
    "wrk": "wrk",
    "/usr/include/openssl/ssl.h": "libssl-dev",
}
# C programs and the libraries that they are linked with.
PROGRAMS = {"load": [], "upstream": ["-lssl", "-lcrypto"]}

# Where Debian's librust-*-dev packages install, and the versions that Cargo.toml asks for.
CRATES = pathlib.Path("/usr/share/cargo/registry")
RUST_PROXY_CRATES = ("hyper-rustls-0.23.*", "rustls-pemfile-1.*")


class Unavailable(Exception):
    """Something that the benchmark needs is missing. The message names the remedy."""


def log(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def prepare() -> None:
    """Install and compile what is missing, or raise Unavailable."""
    if len(os.sched_getaffinity(0)) < 2:
        raise Unavailable(
            "two cores are needed: one for the proxy that is measured, one for the rest"
        )
    missing = sorted(
        {
            package
            for thing, package in DEBIAN.items()
            if not (os.path.exists(thing) or shutil.which(thing))
        }
    )
    if missing:
        command = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise Unavailable(
                f"{', '.join(missing)} must be installed first: sudo {' '.join(command)}"
            )
        log(f"installing {', '.join(missing)}")
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        with _no_services():
            for arguments in (["apt-get", "update"], command):
                subprocess.run(arguments, check=True, stdout=sys.stderr, env=environ)
    for name, libraries in PROGRAMS.items():
        compile_program(name, libraries)


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    # Debian starts an nginx of its own after installing it, unless this file forbids it.
    policy = pathlib.Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def compile_program(name: str, libraries: list[str], folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """Compile NAME.c."""
    return _compile(SOURCES / f"{name}.c", folder / name, ["gcc", "-O2", "-Wall"], libraries)


def go_proxy() -> pathlib.Path:
    """Compile the reverse proxy in Go. Raises Unavailable."""
    if not shutil.which("go"):
        raise Unavailable("needs Go: apt-get install golang-go")
    source, program = SOURCES / "reverse_proxy.go", FOLDER / "go_proxy"
    return _compile(source, program, ["env", f"GOCACHE={FOLDER / 'go'}", "go", "build"])


def rust_proxy() -> pathlib.Path:
    """Compile the reverse proxy in Rust with Debian's crates. Raises Unavailable."""
    if not shutil.which("cargo") or not all(any(CRATES.glob(crate)) for crate in RUST_PROXY_CRATES):
        raise Unavailable(
            "needs Rust and the crates of Debian 12: "
            "apt-get install cargo librust-hyper-rustls-dev librust-rustls-pemfile-dev"
        )
    folder = FOLDER / "rust"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("Cargo.toml", "reverse_proxy.rs"):
        shutil.copy2(SOURCES / name, folder)
    options = ("crates-io.replace-with='debian'", f"debian.directory='{CRATES}'")
    command = ["cargo", "build", "--quiet", "--release", "--offline"]
    command += [f"--config=source.{option}" for option in options]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "target/release/reverse_proxy"


def _compile(
    source: pathlib.Path, program: pathlib.Path, command: list[str], libraries: Sequence[str] = ()
) -> pathlib.Path:
    """Run the compiler unless `program` is newer than its source."""
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        program.parent.mkdir(exist_ok=True)
        subprocess.run([*command, "-o", f"{program}.new", source, *libraries], check=True)
        os.replace(f"{program}.new", program)
    return program


def venv(name: str, *requirements: str) -> pathlib.Path:
    """The folder of a virtual environment under .bench with `requirements` installed."""
    folder = FOLDER / name
    done = folder / "installed"
    if not done.exists() or done.read_text() != " ".join(requirements):
        log(f"installing {' '.join(requirements)} into {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run(
            [
                folder / "bin/python",
                "-m",
                "pip",
                "install",
                "-qq",
                "--disable-pip-version-check",
                *requirements,
            ],
            check=True,
            stdout=sys.stderr,
        )
        done.write_text(" ".join(requirements))
    return folder


def pinned(core: int, *command: str | os.PathLike[str]) -> list[str]:
    return ["taskset", "--cpu-list", str(core), *map(str, command)]


class Process:
    """A process, with its children, that ends when this object is closed.

    Its output goes to `log`.
    """

    def __init__(
        self,
        core: int,
        *command: str | os.PathLike[str],
        log: pathlib.Path,
        cwd: pathlib.Path,
        environ: dict[str, str] | None = None,
        stdout: int | None = None,
    ):
        with open(log, "ab") as file:
            self.popen = subprocess.Popen(
                pinned(core, *command),
                stdin=subprocess.DEVNULL,
                stdout=file if stdout is None else stdout,
                stderr=file,
                cwd=cwd,
                start_new_session=True,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(cwd),
                    "TMPDIR": str(cwd),
                    "LANG": "C.UTF-8",
                    **(environ or {}),
                },
            )
        self.log = log

    def family(self) -> list[int]:
        """The process and its descendants."""
        pids = [self.popen.pid]
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    children = pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text()
                    pids += [int(child) for child in children.split() if int(child) not in pids]
        return pids

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def wait_for(self, what: str, happened: Callable[[], Any], seconds: float = 60) -> Any:
        """Return the result of `happened()` as soon as it is true.

        Raises Unavailable if that takes more than `seconds` or the process exits.
        """
        end = time.monotonic() + seconds
        while not (outcome := happened()):
            if self.popen.poll() is not None or time.monotonic() > end:
                tail = self.log.read_text(errors="replace")[-2000:]
                raise Unavailable(f"{what} did not come; the end of its log:\n{tail}")
            time.sleep(0.01)
        return outcome

    def port(self) -> int:
        """The port that the process names in its log as soon as it listens."""
        found = self.wait_for(
            "'listening on' in the log",
            lambda: re.search(r"listening on \S*127\.0\.0\.1:(\d+)", self.log.read_text()),
        )
        return int(found[1])

    def close(self) -> None:
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(5)
        # Children that are still running are killed.
        self.send(signal.SIGKILL)
        self.popen.wait()
        if self.popen.stdout:
            self.popen.stdout.close()


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of processes, threads that have ended included."""
    # The clocks of clock_getcpuclockid(3), which Python has for threads only.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def memory(pids: list[int]) -> dict[str, float]:
    """KiB of `pss` (shared pages divided among the processes that share them) and `rss`."""
    sizes = {"pss": 0.0, "rss": 0.0}
    for pid in pids:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name = line.partition(":")[0].lower()
            if name in sizes:
                sizes[name] += float(line.split()[1])
    return sizes


def busy_seconds() -> dict[int, float]:
    """Seconds that each core was busy, with any process, or was withheld by the hypervisor."""
    seconds = {}
    for line in pathlib.Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name[:3] == "cpu" and name != "cpu":
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
            seconds[int(name[3:])] = (user + nice + system + irq + softirq + steal) / os.sysconf(
                "SC_CLK_TCK"
            )
    return seconds


def _first_line(*command: str | os.PathLike[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return (done.stdout.strip().splitlines() or [""])[0]


def description() -> dict[str, str]:
    """The hardware and the versions that the figures hold for."""
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    models = re.findall(r"model name\s*: (.*)", cpuinfo)
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nginx": _first_line("nginx", "-v").rpartition("/")[2],
        "openssl": _first_line("openssl", "version").split()[1],
        "xaiproxy": commit(ROOT),
    }


def version(program: str, option: str = "--version") -> str:
    found = re.search(r"\d+(\.\d+)+", _first_line(program, option))
    return found[0] if found else "of unknown version"


def commit(checkout: pathlib.Path) -> str:
    return _first_line("git", "-C", checkout, "describe", "--always", "--dirty")

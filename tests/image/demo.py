"""The demo in containers: a simulated xAI, and the proxy in its network, as an agent would be.

All have a read-only root file system, no capabilities and no network but loopback.
"""

from __future__ import annotations

import errno
import os
import pathlib
import re
import signal
import time

from .archive import Archive
from .containers import TIMEOUT, Container, Containerd, child, most_memory, status
from .report import Report

CLIENT = pathlib.Path(__file__).with_name("client.py").read_text()
UID = 10001
MEMORY = 192  # MiB, with which the proxy has to do
REPLAY_MEMORY = 32  # MiB
HEALTH_CPU = 50  # ms for one health check
STOP_TIMEOUT = 70  # seconds, as documented
SANDBOX = "http://127.0.0.1:9191"
# Prints the least CPU time in ms and the exit status of a command, which is run ten times.
COST = """
import os, sys
costs = []
for _ in range(10):
    pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
    _, status, usage = os.wait4(pid, 0)
    costs.append(1000 * (usage.ru_utime + usage.ru_stime))
print(min(costs), os.waitstatus_to_exitcode(status))
"""
# Prints the modules that both programs import, and those that have no bytecode.
MODULES = """
import os, sys
import xaiproxy.proxy.command, xaiproxy.refresher.command, xaiproxy.serve_command
import xaiproxy.login.command, supervisor.supervisord
paths = [getattr(module, "__cached__", None) for module in sys.modules.values()]
print(len(list(filter(None, paths))), *(p for p in paths if p and not os.path.exists(p)))
"""
# Prints the errno of a write to the root file system, or 0.
WRITE = """
try:
    open("/opt/xaiproxy/file", "w")
    print(0)
except OSError as error:
    print(error.errno)
"""


def check(containerd: Containerd, archive: Archive, folder: pathlib.Path, report: Report) -> None:
    health = archive.config["Healthcheck"]["Test"][1:]
    data, other = (folder_of_the_user(folder / name) for name in ("data", "other"))
    xai = containerd.run(
        "xai",
        *("xai-sandbox", "--auto-approve", "1", "--device-interval", "1"),
        *("--access-token-lifetime", "3", "--events-per-second", "8", "--events", "48"),
        data=other,
    )
    xai.wait_for("TOKEN_PATH=")

    adding = containerd.run("key", "xai-client-key", "add", "demo", data=data)
    added = adding.ended()
    keys = re.findall(r"\bxaip_\S+", "".join(adding.lines))
    report.check("client key", (added, len(keys)) == (0, 1), "made in a container of its own")

    proxy = serve(containerd, "proxy", xai, data)
    seconds = wait_until_healthy(proxy, health)
    report.check("start", seconds < TIMEOUT, f"healthy after {seconds:.1f} s")
    done = proxy.execute("xai-login", "--device")
    report.check("login", done.returncode == 0, f"xai-login ended with {done.returncode}")
    check_privileges(proxy, report)
    check_health(proxy, health, report)
    check_python(proxy, report)
    check_requests(proxy, keys[0], report)
    check_stop(proxy, keys[0], report)

    again = serve(containerd, "again", xai, data)
    wait_until_healthy(again, health)
    code, *_, complete = load(again, 1, keys[0])
    report.check("restart", (code, complete) == (0, 1), "another container has login and key")
    names = sorted(path.name for path in data.iterdir())
    passed = {"tokens.json", "client-keys"} <= set(names)
    report.check("files", passed, f"/data has {', '.join(names)}")


def folder_of_the_user(path: pathlib.Path) -> pathlib.Path:
    path.mkdir(mode=0o700)
    os.chown(path, UID, UID)
    return path


def serve(containerd: Containerd, name: str, xai: Container, data: pathlib.Path) -> Container:
    return containerd.run(
        name,
        data=data,
        network_of=xai,
        memory=MEMORY,
        XAI_PROXY_BIND="0.0.0.0",
        XAI_PROXY_ISSUER=SANDBOX,
        XAI_PROXY_UPSTREAM=SANDBOX,
        XAI_PROXY_REPLAY_MEMORY=str(REPLAY_MEMORY * 2**20),
    )


def wait_until_healthy(container: Container, health: list[str]) -> float:
    """Seconds from the start of the container."""
    while container.execute(*health).returncode:
        if container.process.poll() is not None or container.age() > TIMEOUT:
            raise AssertionError(f"{container.name} does not get healthy: {container.lines[-10:]}")
        time.sleep(0.1)
    return container.age()


def check_privileges(proxy: Container, report: Report) -> None:
    for pid in (proxy.pid, child(proxy.pid, "xai-proxy"), child(proxy.pid, "xai-refresher")):
        fields = status(pid)
        wrong = [name for name in ("CapEff", "CapPrm", "CapBnd") if int(fields[name][0], 16)]
        if set(fields["Uid"] + fields["Gid"]) != {str(UID)} or fields["NoNewPrivs"] != ["1"]:
            wrong.append("Uid")
        report.check(
            "privileges", not wrong, f"{', '.join(wrong) or 'none'} of {fields['Name'][0]}"
        )
    number = int(proxy.execute("python", "-c", WRITE).stdout)
    report.check("root file system", number == errno.EROFS, os.strerror(number))


def check_health(proxy: Container, health: list[str], report: Report) -> None:
    cost, code = map(float, proxy.execute("python", "-c", COST, *health).stdout.split())
    figure = f"{cost:.0f} ms of CPU time, of {HEALTH_CPU}"
    report.check("health check", code == 0 and cost < HEALTH_CPU, figure)
    stopped = child(proxy.pid, "xai-proxy")
    os.kill(stopped, signal.SIGSTOP)
    done = proxy.execute(*health)
    os.kill(stopped, signal.SIGCONT)
    report.check("health check of a proxy that hangs", done.returncode == 1, done.stderr.strip())


def check_python(proxy: Container, report: Report) -> None:
    for python in ("python", "/usr/local/bin/python3", "/usr/bin/python3"):
        done = proxy.execute(python, "-m", "pip", "--version")
        if "no such file" not in done.stderr:
            report.check(f"{python} -m pip", done.returncode == 1, done.stderr.strip())
    count, *lacking = proxy.execute("python", "-c", MODULES).stdout.split()
    figure = ", ".join(lacking[:3]) or f"{count}, none to be compiled"
    report.check("modules", not lacking and int(count) > 100, figure)


def check_requests(proxy: Container, key: str, report: Report) -> None:
    code, count, failed, events, complete = load(proxy, 4, key)
    figure = f"{count} requests, of which {failed} failed; a stream of {events} events meanwhile"
    report.check("demo", code == 0 and count > 0 and not failed and complete == 1, figure)
    most = most_memory(proxy)
    report.check("memory", most < MEMORY, f"{most:.0f} MiB at most, of {MEMORY}")


def check_stop(proxy: Container, key: str, report: Report) -> None:
    """SIGTERM in the middle of a stream."""
    client = proxy.executing("python", "-c", CLIENT, "0")
    began = time.monotonic()
    assert client.stdin is not None and client.stdout is not None
    print(key, file=client.stdin, flush=True)
    if client.stdout.readline() == "begun\n":
        began = time.monotonic()
        proxy.signal(signal.SIGTERM)
    printed, _ = client.communicate(timeout=TIMEOUT)
    code = proxy.ended(STOP_TIMEOUT)
    seconds = time.monotonic() - began
    passed = code == 0 and printed.endswith(" 1\n")
    report.check("stop", passed, f"status {code} after {seconds:.1f} s, and the open stream ended")


def load(proxy: Container, clients: int, key: str) -> list[int]:
    """The exit status of client.py, and what it printed."""
    done = proxy.execute("python", "-c", CLIENT, str(clients), text=f"{key}\n")
    return [done.returncode, *map(int, done.stdout.split()[1:])]

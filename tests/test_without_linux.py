"""The main flows of both processes without all that only Linux has, as on macOS. Not run on a Mac.

The tests themselves need Linux: only the programs that they start are without it (see
support/without_linux/sitecustomize.py).
"""

import os
import re
import subprocess
import sys

from checkout import ROOT, SUPPORT

FLOWS = [
    "http1/test_handler.py::test_a_cancelled_request_closes_the_upstream_connection",
    "http1/test_tunnel.py::test_bytes_pass_both_ways_unchanged",
    "proxy/test_both_directions.py::test_each_chunk_is_forwarded_before_the_next_one_arrives",
    "proxy/test_forward.py::test_a_request_with_a_revoked_token_is_retried_after_the_refresh",
    "proxy/test_last_bytes.py::test_bytes_before_a_cut_arrive",
    "proxy/test_metrics.py::test_both_formats_have_the_same_samples",
    "proxy/test_server.py::test_a_drain_finishes_open_responses",
    "proxy/test_server.py::test_both_connections_use_tcp_keepalive",
    "refresher/test_running.py::test_a_sign_in_during_a_refresh_waits_for_it_and_then_replaces_it",
    "refresher/test_running.py::test_a_stopped_refresher_refreshes_when_it_continues",
    "refresher/test_running.py::test_two_refreshers_of_one_login_never_spend_a_token_twice",
    "test_supervision.py::test_sigterm_drains_the_proxy_before_the_refresher_stops_and_ends_with_0",
]
# Without TCP_INFO, the proxy does not notice a close that the bytes of a next request hide.
EXCEPT = "not with_the_next_request"
NAMES = """
import ctypes, os, select, socket, time
from xaiproxy import kernel, line_writer
names = ["TCP_INFO", "TCP_KEEPIDLE", "CLOCK_BOOTTIME", "prctl", "epoll"]
print(*(hasattr(module, name) for module, name in zip(
    [socket, socket, time, ctypes.CDLL(None), select], names)))
print(os.path.exists("/proc/self/stat"), kernel.memory(), line_writer.LINE_LIMIT)
print(kernel.uptime() > 0, kernel.started_at() > 0, kernel.end_with_parent(os.getppid()))
"""


def environment(**more: str) -> dict[str, str]:
    # The outer pytest's own variables are not for the inner one.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**kept, **more}


def test_a_program_is_without_the_names_of_linux():
    path = f"{SUPPORT / 'without_linux'}{os.pathsep}{ROOT}"
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", NAMES],
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (output.stdout, output.stderr) == (
        "False False False False False\nTrue None 511\nTrue True True\n",
        "",
    )


def test_the_main_flows_work_without_what_only_linux_has():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    done = subprocess.run(
        [*command, "-k", EXCEPT, *(f"tests/{flow}" for flow in FLOWS)],
        cwd=ROOT,
        env=environment(WITHOUT_LINUX="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    result = done.stdout.splitlines()[-1]
    assert int(re.match(r"(\d+) passed", result)[1]) > len(FLOWS) and "skipped" not in result

"""When a client key was last used, as proxies record it beside the key file."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import gevent
import pytest
from proxy_process import PYTHON, ProxyProcess, environment
from refresher_process import mounts
from strace import needs_strace, strace

from xaiproxy import client_keys, key_uses
from xaiproxy.proxy import key_recorder

KEYS = {name: f"xaip_the-key-of-{name}" for name in ("laptop", "phone", "tablet")}
DIGESTS = {name: client_keys.digest(key) for name, key in KEYS.items()}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "client-keys"
    path.write_text("".join(f"{name} {digest}\n" for name, digest in DIGESTS.items()))
    return path


def use(proxy: ProxyProcess, name: str) -> None:
    answer = proxy.ask("GET", "/v1/models", f"X-Api-Key: {KEYS[name]}")
    assert answer.value("X-XAI-Proxy-Error") == "login_required"


def test_a_proxy_records_the_last_use_of_each_key(tmp_path: Path, keys_file: Path) -> None:
    began = time.time()
    with ProxyProcess(tmp_path) as proxy:
        use(proxy, "laptop")
        proxy.ask("GET", "/v1/models", "X-Api-Key: xaip_unknown")
        # Not while requests are served.
        assert not key_uses.path_of(keys_file).exists()
    assert list(key_uses.load(keys_file)) == [DIGESTS["laptop"]]
    assert began <= key_uses.load(keys_file)[DIGESTS["laptop"]] <= time.time()


def test_proxies_that_end_together_lose_no_use(tmp_path: Path, keys_file: Path) -> None:
    proxies = {name: ProxyProcess(tmp_path) for name in KEYS}
    for name, proxy in proxies.items():
        use(proxy, name)
    for proxy in proxies.values():
        proxy.terminate()
    for proxy in proxies.values():
        assert proxy.wait() == 0
    assert set(key_uses.load(keys_file)) == set(DIGESTS.values())


@mounts
def test_a_read_only_folder_harms_no_request_and_is_logged_once(
    tmp_path: Path, keys_file: Path
) -> None:
    script = 'mount --bind . .; mount -o remount,bind,ro .; cd "$PWD"; exec "$@"'
    with ProxyProcess(tmp_path, prefix=("unshare", "-rm", "sh", "-ec", script, "sh")) as proxy:
        use(proxy, "laptop")
    [line] = [line for line in proxy.log_lines() if "last use" in line["message"]]
    assert line["level"] == "info" and "Read-only file system" in line["message"]
    assert not key_uses.path_of(keys_file).exists()


class Recording:
    """A Recorder in this process, with keys that a test uses."""

    def __init__(self, keys_file: Path, interval: float = 0.01):
        self.keys = client_keys.ClientKeys(keys_file)
        self.recorder = key_recorder.Recorder(self.keys)
        self._interval = interval

    def __enter__(self) -> Recording:
        self._greenlet = gevent.spawn(self.recorder.run, self._interval)
        return self

    def __exit__(self, *_error: object) -> None:
        self._greenlet.kill()

    def use(self, name: str) -> float:
        assert self.keys.name_of(KEYS[name]) == name
        return self.keys.last_uses[DIGESTS[name]]


def await_(condition: Callable[[], object]) -> None:
    """Run the event loop until `condition` holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        gevent.sleep(0.005)


def test_uses_are_written_after_each_interval(keys_file: Path) -> None:
    with Recording(keys_file) as recording:
        for name in ("laptop", "phone", "laptop"):
            at = recording.use(name)
            await_(lambda: key_uses.load(keys_file).get(DIGESTS[name]) == at)


def test_a_write_that_another_proxy_overwrites_is_made_up_for(keys_file: Path) -> None:
    with Recording(keys_file) as recording:
        at = recording.use("laptop")
        await_(lambda: key_uses.load(keys_file))
        key_uses.path_of(keys_file).write_text(f'{{"{DIGESTS["phone"]}": 1000}}')
        await_(lambda: key_uses.load(keys_file) == {DIGESTS["laptop"]: at, DIGESTS["phone"]: 1000})


def test_a_key_that_was_just_made_is_known_without_a_request(keys_file: Path) -> None:
    text = keys_file.read_text()
    keys_file.write_text(text.replace("phone", "# phone"))
    with Recording(keys_file) as recording:
        recording.use("laptop")
        await_(lambda: key_uses.load(keys_file))
        keys_file.write_text(text)
        key_uses.save(keys_file, {DIGESTS["phone"]: 1000}, DIGESTS.values())
        recording.use("laptop")
        inode = key_uses.path_of(keys_file).stat().st_ino
        await_(lambda: key_uses.path_of(keys_file).stat().st_ino != inode)
        assert DIGESTS["phone"] in key_uses.load(keys_file)


def test_a_broken_key_file_makes_no_use_forgotten(keys_file: Path) -> None:
    key_uses.save(keys_file, {DIGESTS["phone"]: 1000}, DIGESTS.values())
    recording = Recording(keys_file)
    recording.use("laptop")
    keys_file.write_text("half a line")
    assert recording.recorder.save()
    assert key_uses.load(keys_file) == {DIGESTS["phone"]: 1000}


def test_a_failure_is_logged_once_until_it_is_over(
    keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    recording = Recording(keys_file)
    place = key_uses.path_of(keys_file)
    for _ in range(2):
        place.mkdir()
        for _ in range(3):
            recording.use("laptop")
            assert recording.recorder.save()
        place.rmdir()
        assert recording.recorder.save()
        place.unlink()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and str(place) in messages[0]


SLOW = """if True:
    import sys, time
    from pathlib import Path
    from gevent import monkey
    monkey.patch_all()
    import gevent
    from xaiproxy import client_keys, key_uses
    from xaiproxy.proxy import key_recorder

    path = Path(sys.argv[1])
    keys = client_keys.ClientKeys(path)
    keys.name_of(sys.argv[2])
    began = last = time.monotonic()
    longest = 0
    saving = gevent.spawn(key_recorder.Recorder(keys).save)
    while not saving.ready():
        gevent.sleep(0.01)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    print(now - began, longest, len(key_uses.load(path)))
"""


@needs_strace
def test_a_slow_disk_does_not_block_the_event_loop(keys_file: Path) -> None:
    delay = strace(os.devnull, "-e", "trace=fsync", "-e", "inject=fsync:delay_enter=2000000")
    arguments = [*delay, *PYTHON, "-c", SLOW, str(keys_file), KEYS["laptop"]]
    done = subprocess.run(
        arguments, cwd=keys_file.parent, env=environment(keys_file.parent), capture_output=True
    )
    took, longest_gap, recorded = map(float, done.stdout.split())
    assert done.stderr == b"" and recorded == 1
    assert took > 2 and longest_gap < 1

"""tokens.json for its readers: states of a login that cannot be used, no torn read, and the files
beside it.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from xaiproxy import config, errors, token_json, token_store, tokens
from xaiproxy.token_store import TokenStore

LOGIN = {"access_token": "access", "refresh_token": "refresh", "expires_at": 2000}
CLIENT = config.DEFAULT_CLIENT_ID
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a file to another user"
)


def make_store(folder, **settings) -> TokenStore:
    environ = {
        "XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json"),
        **{f"XAI_PROXY_{name.upper()}": value for name, value in settings.items()},
    }
    return TokenStore(config.from_environ(environ, dotenv_path=os.devnull))


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


def put(store, login=LOGIN, **members):
    store.path.write_text(json.dumps({**login, **members}))


def state(store) -> str:
    """The state of a login that cannot be used, which load and current must agree about."""
    with pytest.raises(errors.LoginUnusable) as loaded:
        store.load()
    with pytest.raises(errors.LoginUnusable) as current:
        store.current()
    assert str(loaded.value) == str(current.value) and loaded.value.exit_code == 77
    assert str(store.path) in str(loaded.value) and "secret" not in str(loaded.value)
    return loaded.value.state


# reading


def test_a_login_is_loaded(store):
    put(store)
    assert store.load() == store.current() == token_json.from_json(json.dumps(LOGIN))


def test_current_reads_again_only_after_a_change_of_the_file(store):
    put(store)
    first = store.current()
    assert store.current() is first
    # The new content has the same size.
    (store.path.parent / "next").write_text(json.dumps({**LOGIN, "access_token": "newone"}))
    os.utime(
        store.path.parent / "next",
        ns=(store.path.stat().st_atime_ns, store.path.stat().st_mtime_ns),
    )
    os.replace(store.path.parent / "next", store.path)
    assert store.current().access_token == "newone"


def test_current_follows_the_file_through_every_state(store):
    assert state(store) == "missing"
    put(store)
    assert store.current().access_token == "access"
    store.path.write_text("{")
    assert state(store) == "corrupt"
    put(store, access_token="other")
    assert store.current().access_token == "other"
    store.path.unlink()
    assert state(store) == "missing"


def test_an_unusable_login_is_raised_again_with_a_short_traceback(store):
    store.path.write_text("{")
    for _ in range(3):
        with pytest.raises(errors.LoginUnusable) as caught:
            store.current()
    # The frames of this test and of current().
    assert len(caught.traceback) == 2


# 10,000 reads against 500 renames, in processes of their own

WRITER = """
import os, sys
from xaiproxy import config, token_store, token_writer, tokens
store = token_store.TokenStore(config.from_environ({"XAI_PROXY_TOKEN_PATH": sys.argv[1]}, dotenv_path=os.devnull))
for number in range(500):
    with token_writer.locked(store, 5) as writer:
        writer.save(tokens.Login(f"access{number}", 2000, f"refresh{number}", extra={"filling": str(number) * 6000}))
"""
READER = """
import os, sys
from xaiproxy import config, token_store
store = token_store.TokenStore(config.from_environ({"XAI_PROXY_TOKEN_PATH": sys.argv[1]}, dotenv_path=os.devnull))
reads, seen = 0, set()
while reads < 5000 or "access499" not in seen:
    login = [store.load, store.current][reads % 2]()
    number = login.access_token.removeprefix("access")
    assert login.refresh_token == f"refresh{number}" and login.extra["filling"] == number * 6000
    reads += 1
    seen.add(login.access_token)
print(reads, len(seen))
"""


def test_ten_thousand_reads_against_five_hundred_renames_see_no_torn_file(store):
    put(store, access_token="access0", refresh_token="refresh0", filling="0" * 6000)
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, store.path], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    subprocess.run([sys.executable, "-c", WRITER, store.path], check=True, timeout=60)
    for reader in readers:
        reads, seen = map(int, reader.communicate(timeout=60)[0].split())
        assert reader.returncode == 0 and reads >= 5000
        # The reads and the renames overlapped.
        assert seen > 50


# refused tokens


def test_a_reported_refusal_counts_until_it_is_withdrawn(store):
    put(store)
    login = store.load()
    assert not store.is_refused(login, time.time())
    store.ask_refresh("another")
    assert not store.is_refused(login, time.time())
    store.ask_refresh("access")
    assert store.is_refused(login, time.time()) and make_store(store.path.parent).is_refused(
        login, time.time()
    )
    # A note of another hour, or one that is not repeated.
    for step in (-3600, 3600):
        assert not make_store(store.path.parent).is_refused(login, time.time() + step)
    now = store.refused_path.stat().st_mtime
    # The refresher may not have read it.
    store.withdraw(now + token_store.NOTE_TIME - 1)
    assert store.is_refused(login, time.time())
    store.withdraw(now + token_store.NOTE_TIME)
    assert (
        not store.is_refused(login, time.time())
        and store.refused is None
        and not store.refused_path.exists()
    )


def test_a_report_about_another_token_is_not_withdrawn(store):
    put(store)
    store.ask_refresh("access")
    make_store(store.path.parent).ask_refresh("another")
    store.withdraw(time.time() + 99)
    assert store.refused is None and store.asked_for() == tokens.fingerprint("another")


def test_a_refusal_that_could_not_be_reported_counts_for_a_minute(store):
    put(store)
    store.remember_refusal("access")
    assert store.is_refused(store.load(), time.time()) and not make_store(
        store.path.parent
    ).is_refused(store.load(), time.time())
    store._refused_at -= token_store.REFUSAL_TIME
    assert not store.is_refused(store.load(), time.time())


# states


def test_a_file_that_cannot_be_opened_is_unreadable(store):
    os.mkdir(store.path)
    assert state(store) == "unreadable"
    os.rmdir(store.path)
    # A FIFO, which must not block.
    os.mkfifo(store.path)
    assert state(store) == "unreadable"


UNPRIVILEGED = """
import os, sys
from xaiproxy import config, errors, token_store
store = token_store.TokenStore(config.from_environ({"XAI_PROXY_TOKEN_PATH": sys.argv[1]}, dotenv_path=os.devnull))
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    store.load()
except errors.LoginUnusable as error:
    print(error.state, os.geteuid(), error)
"""


def test_a_file_without_permission_is_unreadable():
    # pytest's own folder is closed to other users.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        path = os.path.join(folder, "tokens.json")
        os.close(os.open(path, os.O_CREAT, 0o000))
        output = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, path], capture_output=True, text=True
        ).stdout
    state, user, sentence = output.split(" ", 2)
    assert state == "unreadable"
    assert (
        sentence == f"{path} cannot be read (Permission denied); make it readable for user {user}\n"
    )


@pytest.mark.parametrize(
    "content", ["", "{", "secret", '{"access_token": "secret secret"}', " " * (1 << 20) + "{}"]
)
def test_a_file_that_does_not_parse_is_corrupt(store, content):
    store.path.write_text(content)
    assert state(store) == "corrupt"


def test_a_file_longer_than_a_login_can_be_is_not_read_whole(store):
    with open(store.path, "w") as file:
        file.write(json.dumps(LOGIN))
        file.truncate(1 << 40)
    assert state(store) == "corrupt"


@needs_root
def test_another_users_file_with_a_refresh_token_is_refused(store):
    put(store)
    os.chown(store.path, 12345, 12345)
    assert state(store) == "not_ours"
    put(store, refresh_token=None)
    assert store.load().access_token == "access"


def test_a_link_is_followed_only_without_a_refresh_token(store):
    store.path.symlink_to("elsewhere.json")
    assert state(store) == "missing"
    put(store)
    assert state(store) == "symlink"
    # A mounted Secret.
    put(store, refresh_token=None)
    assert store.current().access_token == "access"


def test_a_mounted_secret_is_followed_when_the_kubelet_swaps_it(store):
    folder = store.path.parent
    for name in ("1", "2"):
        (folder / name).mkdir()
        (folder / name / "tokens.json").write_text(
            json.dumps({**LOGIN, "refresh_token": None, "access_token": name})
        )
    (folder / "..data").symlink_to("1")
    store.path.symlink_to("..data/tokens.json")
    assert store.current().access_token == "1"
    (folder / "..tmp").symlink_to("2")
    os.replace(folder / "..tmp", folder / "..data")
    assert store.current().access_token == "2"


def test_another_issuers_or_clients_login_is_foreign(store):
    put(store, issuer="https://login.example")
    assert state(store) == "foreign"
    put(store, client_id="another")
    assert state(store) == "foreign"
    put(store, issuer=config.DEFAULT_ISSUER, client_id=CLIENT)
    assert store.load()


def test_a_file_that_names_no_issuer_is_xais_and_foreign_to_any_other(tmp_path):
    store = make_store(tmp_path, issuer="http://127.0.0.1:1", upstream="http://127.0.0.1:1")
    put(store)
    assert state(store) == "foreign"


def test_a_login_of_xai_is_sent_to_xai_only(tmp_path):
    store = make_store(tmp_path, upstream="http://127.0.0.1:1")
    put(store)
    assert state(store) == "foreign"


@pytest.mark.parametrize(
    "url, good",
    [
        ("https://x.ai", True),
        ("https://api.x.ai/v1", True),
        ("https://API.X.AI", True),
        ("https://api.x.ai:443", True),
        ("http://api.x.ai", False),
        ("https://evilx.ai", False),
        ("https://x.ai.evil.example", False),
        ("https://api.x.ai@evil.example", False),
        ("https://user@api.x.ai", False),
        ("https://api.x.ai:444", False),
        ("https://", False),
        ("api.x.ai", False),
        ("https://x.ai.", False),
        ("https://api.x.ai.:443", False),
        ("https://api.x.ai:443@evil.example", False),
        ("https://evil.example/.x.ai", False),
        ("https://evil.example?.x.ai", False),
        ("https://evil.example#.x.ai", False),
        ("https://xn--x-7fa.ai", False),
        ("https://api.x\uff0eai", False),
        ("https://api-x.ai", False),
        ("//api.x.ai", False),
        ("wss://api.x.ai", False),
        ("https://[::1].x.ai", False),
    ],
)
def test_an_address_of_xai_is_recognized(url, good):
    assert token_store.is_xai(url) is good


# the proxy's request and the refresher's heartbeat


def test_the_note_has_only_a_fingerprint_of_the_refused_token(store):
    assert store.asked_for() is None
    store.ask_refresh("secret token")
    assert store.asked_for() == tokens.fingerprint("secret token")
    assert store.refused_path.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(store.path.parent)) == ["tokens.json.refused"]


def test_a_note_that_cannot_be_written_is_an_error_and_leaves_no_file(store):
    os.mkdir(store.refused_path)
    with pytest.raises(OSError):
        store.ask_refresh("token")
    assert os.listdir(store.path.parent) == ["tokens.json.refused"]


def test_the_refresher_is_alive_while_the_locks_time_is_recent(store):
    assert (store.refresher_age(100), store.refresher_alive(100)) == (None, False)
    store.lock_path.touch()
    for touched, now, age, alive in [
        (1000, 1059.9, 59.9, True),
        (1000, 1060, 60, False),
        (1000, 940.1, -59.9, True),
        (1000, 900, -100, False),
        (0, 10, None, False),
    ]:
        os.utime(store.lock_path, (touched, touched))
        assert store.refresher_age(now) == (age if age is None else pytest.approx(age))
        assert store.refresher_alive(now) is alive
    os.utime(store.lock_path)
    assert store.refresher_alive(time.time())


# a read that fails


@contextlib.contextmanager
def no_descriptor():
    """The process can open nothing."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def disk_error(store):
    """Every read of the file fails with EIO: nothing is mapped at the beginning of a process's
    memory.
    """
    kept = store.path.rename(store.path.with_name("kept"))
    store.path.symlink_to("/proc/self/mem")
    try:
        yield
    finally:
        kept.rename(store.path)


def test_a_failed_read_is_not_remembered(store):
    put(store)
    assert store.current().access_token == "access"
    put(store, access_token="second")
    with no_descriptor():
        for _ in range(2):
            with pytest.raises(errors.LoginUnread, match="Too many open files"):
                store.current()
    assert store.current().access_token == "second"


def test_the_last_login_is_known_while_the_file_cannot_be_read(store):
    put(store)
    for number, failing in enumerate([no_descriptor(), disk_error(store)]):
        before = store.last_known()
        put(store, access_token=f"access-{number}")
        with failing:
            with pytest.raises(errors.LoginUnread):
                store.load()
            assert store.last_known() is store.last_known() is before
        assert (
            store.last_known() == store.current()
            and store.current().access_token == f"access-{number}"
        )


@pytest.mark.parametrize(
    "arrange, state",
    [
        (lambda store: store.path.unlink(), "missing"),
        (lambda store: store.path.write_text("{"), "corrupt"),
    ],
)
def test_a_removed_login_is_missing(store, arrange, state):
    put(store)
    store.last_known()
    arrange(store)
    with pytest.raises(errors.LoginUnusable) as caught:
        store.last_known()
    assert caught.value.state == state
    put(store, access_token="other")
    with no_descriptor(), pytest.raises(errors.LoginUnread):
        store.last_known()
    assert store.last_known().access_token == "other"


def test_a_login_removed_while_no_file_can_be_opened_is_missing(store):
    """Without a descriptor, an open fails before it searches for the file."""
    put(store)
    store.last_known()
    store.path.unlink()
    with no_descriptor(), pytest.raises(errors.LoginUnusable) as caught:
        store.last_known()
    assert caught.value.state == "missing"


def test_a_failed_first_read_is_an_error_and_not_remembered(store):
    put(store)
    with no_descriptor(), pytest.raises(errors.LoginUnread) as caught:
        store.last_known()
    assert caught.value.state == "unreadable"
    assert store.last_known().access_token == "access"


@needs_root
def test_a_restored_permission_is_noticed_without_a_change_of_the_file(store):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        store = make_store(Path(folder))
        put(store, refresh_token=None)
        os.chown(store.path, 12345, 12345)
        store.path.chmod(0o640)
        os.seteuid(65534)
        try:
            assert state(store) == "unreadable"
            os.seteuid(0), os.setegid(12345), os.seteuid(65534)
            assert store.current().access_token == "access"
        finally:
            os.seteuid(0), os.setegid(0)

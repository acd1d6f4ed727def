"""Any kind of file in the token folder, under a name of ours, neither hangs a program nor fills
its memory.
"""

import json
import os
import resource
import shutil
import signal
import socket
import stat
import time
from pathlib import Path

import pytest
from proxy_process import ProxyProcess
from refresher_process import Process

from xaiproxy import (
    client_key_command,
    client_keys,
    config,
    errors,
    folder_file,
    token_lock,
    token_writer,
    tokens,
)
from xaiproxy.token_store import TokenStore

# Bytes, none of which is on the disk.
SPARSE = 1 << 30
LOGIN = tokens.Login("access", 4e9, "refresh")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        # An address holds 107 bytes.
        listener.bind(os.path.relpath(path))


def make_device(path: Path) -> None:
    try:
        # As /dev/zero.
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root can make a device")


def make_link(path: Path) -> None:
    precious(path).write_text("precious")
    path.symlink_to(precious(path))


def make_sparse(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, SPARSE)


def precious(path: Path) -> Path:
    return path.parent / "precious"


KINDS = {
    "FIFO": os.mkfifo,
    "directory": os.mkdir,
    "socket": make_socket,
    "device": make_device,
    "link": make_link,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "nowhere": lambda path: path.symlink_to("nowhere"),
}


def clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def memory() -> int:
    """The maximum of this process's memory so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(autouse=True)
def in_time():
    """Fail a test that would wait for the other end of a FIFO."""
    former = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tokens.json"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "flags", [os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL]
)
def test_only_a_regular_file_is_opened(path, kind, flags):
    KINDS[kind](path)
    before = descriptors()
    with pytest.raises(folder_file.NotAFile) as refused:
        folder_file.opened(path, flags)
    assert refused.value.filename == str(path) and descriptors() == before
    assert refused.value.strerror == (
        "it is a symbolic link" if path.is_symlink() else "it is not a file"
    )
    assert not (path.parent / "nowhere").exists() and (
        kind != "link" or precious(path).read_text() == "precious"
    )


def test_a_link_is_followed_where_links_are_allowed(path):
    make_link(path)
    content, status = folder_file.read(path, 100, follow=True)
    assert content == b"precious" and status.st_ino == precious(path).stat().st_ino
    clear(path)
    KINDS["endless"](path)
    with pytest.raises(folder_file.NotAFile):
        folder_file.read(path, 100, follow=True)


def test_a_file_that_replaced_the_checked_one_is_not_opened(path):
    """Between the check and the open, another process swaps the file for a FIFO, and back."""
    path.touch()
    os.mkfifo(path.with_name("fifo"))
    path.with_name("file").touch()
    child = os.fork()
    if child == 0:
        while os.getppid() != 1:
            for name in ("fifo", "file"):
                try:
                    os.link(path.with_name(name), path.with_name("next"))
                    os.rename(path.with_name("next"), path)
                except OSError:
                    pass
    try:
        outcomes, end = set(), time.monotonic() + 0.5
        while time.monotonic() < end:
            try:
                fd = folder_file.opened(path, os.O_RDONLY)
            except folder_file.NotAFile as error:
                outcomes.add(error.strerror)
            else:
                assert stat.S_ISREG(os.fstat(fd).st_mode)
                os.close(fd)
                outcomes.add("opened")
        assert outcomes == {"it is not a file", "opened"}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_new_file_is_private_and_not_inherited(path):
    former = os.umask(0)
    try:
        fd = folder_file.opened(path, os.O_RDWR | os.O_CREAT)
    finally:
        os.umask(former)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and not os.get_inheritable(fd)
    os.close(fd)
    with pytest.raises(FileExistsError):
        folder_file.opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        folder_file.read(path, 10)


def test_a_file_is_read_up_to_the_limit(path):
    make_sparse(path)
    before = memory()
    assert folder_file.read(path, 100)[0] == bytes(100)
    assert memory() - before < 10_000
    path.write_bytes(b"short")
    assert folder_file.read(path, 5)[0] == folder_file.read(path, 6)[0] == b"short"
    assert folder_file.read(path, 4)[0] == b"shor"


# Everything that opens a file of the folder


def make_store(path: Path) -> TokenStore:
    return TokenStore(
        config.from_environ({"XAI_PROXY_TOKEN_PATH": str(path)}, dotenv_path=os.devnull)
    )


@pytest.mark.parametrize("kind", [*KINDS, "sparse"])
def test_any_kind_of_file_in_a_files_place_is_named_and_not_changed(
    path, kind, capsys, monkeypatch
):
    make = {**KINDS, "sparse": make_sparse}[kind]
    monkeypatch.setenv("XAI_PROXY_TOKEN_PATH", str(path))
    store, usable, before = make_store(path), kind == "sparse", memory()
    with token_writer.locked(store, 0) as writer:
        writer.save(LOGIN)

    def error_of(place: Path, act) -> str:
        clear(place)
        make(place)
        try:
            act()
        except errors.Error as error:
            assert place.name in str(error) and "Traceback" not in str(error)
            return str(error)
        finally:
            clear(place)
            assert kind != "link" or precious(path).read_text() == "precious"
        return ""

    def lock() -> None:
        with token_writer.locked(store, 0):
            pass

    for place, act in (
        (store.lock_path, lock),
        (store.lock_path, lambda: token_lock.beat(store)),
        (store.new_path, lock),
    ):
        message = error_of(place, act)
        assert not message if usable else f"move {place} away" in message
    # The proxy's note is replaced, whatever kind of file it is.
    assert error_of(store.refused_path, store.asked_for) == ""
    if kind != "directory":
        assert error_of(store.refused_path, lambda: store.ask_refresh("access")) == ""

    keys = path.with_name("client-keys")
    for place, fine in (
        (keys, False),
        (keys.with_name("client-keys.lock"), usable),
        (keys.with_name("client-keys.new"), kind != "directory"),
    ):
        clear(place)
        make(place)
        code = client_key_command.main(["add", "laptop"])
        printed = capsys.readouterr()
        assert (code == 0) is fine and (fine or place.name in printed.err), (place, printed)
        for each in (place, keys, keys.with_name("client-keys.lock")):
            clear(each)
        assert kind != "link" or precious(path).read_text() == "precious"

    kept = path.read_bytes()
    message = error_of(path, store.load)
    assert message
    path.write_bytes(kept)
    path.chmod(0o600)
    assert store.load() == LOGIN
    assert memory() - before < 30_000


@pytest.mark.parametrize("kind", ["link", "endless", "sparse"])
def test_a_dotenv_is_read_within_bounds(path, kind):
    dotenv, before = path.with_name(".env"), memory()
    {**KINDS, "sparse": make_sparse}[kind](dotenv)
    if kind == "sparse":
        with pytest.raises(
            errors.ConfigurationError, match=r"\.env cannot be read: it is longer than"
        ):
            config.from_environ({})
    else:
        config.from_environ({})
    assert memory() - before < 10_000


def test_a_dotenv_may_begin_with_a_byte_order_mark(path):
    path.with_name(".env").write_bytes(
        b"\xef\xbb\xbfXAI_PROXY_PORT=4321\r\nXAI_PROXY_LOG_LEVEL=debug\r\n"
    )
    settings = config.from_environ({})
    assert (settings.port, settings.log_level) == (4321, "debug")


# The programs


def test_the_refresher_continues_and_ends_with_any_kind_of_file_as_the_note(sandbox, path):
    sandbox.write_login(path)
    note = path.with_name("tokens.json.refused")
    process = Process(sandbox, path)
    try:
        process.wait_for("the access token lasts until")
        for number, make in enumerate([*KINDS.values(), make_sparse, os.mkfifo], 1):
            clear(note)
            try:
                make(note)
            except pytest.skip.Exception:
                continue
            sandbox.write_login(path, account=f"{number}@example.com")
            process.wait_for(f"signed in as {number}@example.com")
        size = int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0])
        assert size < 100_000, f"{size} KiB"
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.close()


def test_the_proxy_names_the_file_and_serves_once_it_is_corrected(path):
    keys = path.with_name("client-keys")
    with ProxyProcess(path.parent) as proxy:
        before = proxy.resident_kib()
        for kind, make in {**KINDS, "sparse": make_sparse}.items():
            # A link is followed here.
            if kind in ("device", "link", "nowhere"):
                continue
            clear(path)
            make(path)
            answer = proxy.ask("GET", "/v1/models")
            assert answer.status == 401 and str(path) in json.loads(answer.body)["error"]["message"]
        proxy.sign_in()
        assert proxy.ask("GET", "/v1/models").value("X-XAI-Proxy-Error") == "upstream_unreachable"
        for kind, make in {**KINDS, "sparse": make_sparse}.items():
            if kind in ("device", "link"):
                continue
            clear(keys)
            make(keys)
            start = len(proxy.log_lines())
            assert (
                proxy.ask("GET", "/v1/models").value("X-XAI-Proxy-Error") == "client_key_required"
            )
            clear(keys)
            keys.write_text(f"a {client_keys.digest('a-key')}\n")
            answer = proxy.ask("GET", "/v1/models", "Authorization: Bearer a-key")
            assert answer.value("X-XAI-Proxy-Error") == "upstream_unreachable"
            proxy.wait_for_log(
                lambda line: f"{keys} cannot be used" in line["message"], start=start
            )
        assert proxy.resident_kib() - before < 20_000

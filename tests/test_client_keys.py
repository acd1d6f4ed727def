"""The key file: its format, and that no client is admitted with a malformed one."""

import contextlib
import hashlib
import logging
import os
import resource
import tempfile
from pathlib import Path

import pytest

from xaiproxy import client_keys
from xaiproxy.client_keys import ClientKeys, parse

DIGEST = client_keys.digest("key-of-a")
OTHER = client_keys.digest("key-of-b")
UNPRIVILEGED = 65534


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "client-keys"


def put(path: Path, *lines: str) -> None:
    """Write it by rename, as the command does."""
    new = path.with_suffix(".written")
    new.write_text("".join(line + "\n" for line in lines))
    new.replace(path)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def open_folder():
    """A folder that an unprivileged user can search, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        yield Path(folder)


@contextlib.contextmanager
def without_root():
    """The privileges of another user if this process has root's; its own otherwise."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


def admits(keys: ClientKeys) -> list[str | None]:
    keys.refresh()
    return [keys.name_of("key-of-a"), keys.name_of("key-of-b")]


@pytest.fixture
def complaints(caplog):
    """The logged messages, each of which is an error."""

    def read() -> list[str]:
        records = [record for record in caplog.records if record.name == client_keys.__name__]
        lines = [record.getMessage() for record in records]
        assert {record.levelno for record in records} <= {logging.ERROR}
        assert all(DIGEST not in line and "key-of" not in line for line in lines)
        return lines

    return read


# parsing


@pytest.mark.parametrize(
    "text",
    [
        f"a {DIGEST}",
        f"a {DIGEST}\n",
        f"\n\n# a comment\n  a \t {DIGEST} \r\n\t\n#b {OTHER}\n",
        f"a\t{DIGEST}\r\n",
    ],
)
def test_a_name_and_the_sha_256_of_a_key_a_line(text):
    assert parse(text) == {"a": DIGEST}
    assert hashlib.sha256(b"key-of-a").hexdigest() == DIGEST


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "-", "..", "x" * 64])
def test_a_name_may_have_letters_digits_and_punctuation(name):
    assert parse(f"{name} {DIGEST}\nb {OTHER}") == {name: DIGEST, "b": OTHER}


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", " \t \r\n"])
def test_a_file_may_be_without_keys(text):
    assert parse(text) == {}


@pytest.mark.parametrize(
    "line",
    [
        "a",
        f"{DIGEST}",
        f"a {DIGEST[:-1]}",
        f"a {DIGEST}0",
        f"a {DIGEST.upper()}",
        f"a {DIGEST[:-1]}g",
        f"a{DIGEST}",
        f"a b {DIGEST}",
        f"a {DIGEST} # why",
        f"a: {DIGEST}",
        f"a,{DIGEST}",
        f"é {DIGEST}",
        f"{'x' * 65} {DIGEST}",
        f"{DIGEST} a",
        "a key-of-a",
        f"a\xa0{DIGEST}",
        f"\ufeffa {DIGEST}",
        f"a {DIGEST}\0",
        "\0",
        f"a/b {DIGEST}",
        f"a {OTHER[:30]}",
        f"a  # {DIGEST}",
        "a " + "\uff11" * 64,
    ],
)
def test_any_other_line_is_a_value_error_that_only_names_its_number(line):
    with pytest.raises(ValueError) as caught:
        parse(f"b {OTHER}\n\n{line}\n")
    assert str(caught.value) == "line 3 is not a name and the SHA-256 of a key"


def test_a_name_is_in_the_file_once():
    with pytest.raises(ValueError, match="^line 3 repeats the name a$"):
        parse(f"a {DIGEST}\nb {OTHER}\na {OTHER}\n")


# the name of a key


def test_a_key_is_known_by_its_hash(path):
    put(path, f"a {DIGEST}", f"b {OTHER}")
    keys = ClientKeys(path)
    assert admits(keys) == ["a", "b"]
    for key in ("", "key-of-", "key-of-a ", "KEY-OF-A", DIGEST, "a", "é", "\udcff", "x" * 100000):
        assert keys.name_of(key) is None


# reading


def test_without_a_file_no_key_is_required(path, complaints):
    keys = ClientKeys(path)
    assert not keys.required and admits(keys) == [None, None] and complaints() == []


def test_a_file_that_appears_later_is_read(path):
    keys = ClientKeys(path)
    put(path, f"a {DIGEST}")
    assert admits(keys) == ["a", None] and keys.required


def test_the_file_is_read_again_when_it_changes(path):
    put(path, f"a {DIGEST}")
    keys = ClientKeys(path)
    # Another file of the same size.
    put(path, f"b {OTHER}")
    assert admits(keys) == [None, "b"]
    # A change in place, with the same inode.
    with open(path, "a") as file:
        file.write(f"a {DIGEST}\n")
    assert admits(keys) == ["a", "b"]


@needs_root
def test_the_file_is_not_read_again_when_it_does_not_change(open_folder):
    path = open_folder / "client-keys"
    put(path, f"a {DIGEST}")
    path.chmod(0o600)
    keys = ClientKeys(path)
    with without_root():
        # Another read would fail.
        assert admits(keys) == ["a", None]
        assert admits(ClientKeys(path)) == [None, None]


def make_directory(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    # No process will open it for writing.
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    # Even stat fails at a loop.
    path.symlink_to(path.name)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def make_dangling_folder(path: Path) -> None:
    path.symlink_to("nowhere/client-keys")


def make_link_through_a_file(path: Path) -> None:
    path.with_name("plain").touch()
    path.symlink_to("plain/client-keys")


def make_file(text: str | bytes):
    def make(path: Path) -> None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    return make


BROKEN = {
    "empty": (make_file(""), "holds no key"),
    "without a key": (make_file("# made by hand\n"), "holds no key"),
    "half-written": (
        make_file(f"a {DIGEST}\nb {OTHER[:20]}"),
        "line 2 is not a name and the SHA-256 of a key",
    ),
    "a key itself": (make_file("key-of-a\n"), "line 1 is not a name and the SHA-256 of a key"),
    "a name twice": (make_file(f"a {DIGEST}\na {OTHER}\n"), "line 2 repeats the name a"),
    "not UTF-8": (make_file(b"a \xff\xfe\n"), "decode"),
    "a directory": (make_directory, "it is not a file"),
    "a FIFO": (make_fifo, "it is not a file"),
    "a loop of links": (make_loop, "Too many levels of symbolic links"),
    "a link to nothing": (make_dangling, "it is a link to nothing"),
    "a link into no folder": (make_dangling_folder, "it is a link to nothing"),
    "a link through a file": (make_link_through_a_file, "Not a directory"),
    "too long": (make_file(f"a {DIGEST}\n" + "#" * (1 << 20)), "longer than 1048576 bytes"),
}


@pytest.mark.parametrize("make, complaint", BROKEN.values(), ids=BROKEN)
def test_an_unusable_file_admits_no_client_and_is_logged_once(path, complaints, make, complaint):
    make(path)
    keys = ClientKeys(path)
    for _ in range(3):
        assert admits(keys) == [None, None] and keys.required
    (line,) = complaints()
    assert str(path) in line and complaint in line and "xai-client-key add" in line


@pytest.mark.parametrize("make, complaint", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_admits_no_client_until_it_is_corrected(path, complaints, make, complaint):
    put(path, f"a {DIGEST}")
    keys = ClientKeys(path)
    path.unlink()
    make(path)
    assert admits(keys) == admits(keys) == [None, None] and keys.required
    assert len(complaints()) == 1 and complaint in complaints()[0]
    path.rmdir() if path.is_dir() else path.unlink()
    put(path, f"a {DIGEST}")
    assert admits(keys) == ["a", None]
    assert len(complaints()) == 1
    path.unlink()
    make(path)
    assert admits(keys) == [None, None]
    # It broke once more.
    assert len(complaints()) == 2


def test_a_link_that_appears_later_admits_no_client_until_its_target_exists(path):
    keys = ClientKeys(path)
    assert not keys.required
    path.symlink_to("elsewhere")
    assert admits(keys) == [None, None] and keys.required
    put(path.with_name("elsewhere"), f"a {DIGEST}")
    assert admits(keys) == ["a", None]


def test_a_parent_folder_that_becomes_a_dangling_link_or_closed_admits_no_client(
    open_folder, complaints
):
    folder = open_folder / "folder"
    keys = ClientKeys(folder / "client-keys")
    admits(keys)
    assert not keys.required
    folder.symlink_to("not-mounted")
    assert admits(keys) == [None, None] and keys.required
    folder.unlink()
    folder.mkdir()
    keys = ClientKeys(folder / "client-keys")
    assert not keys.required
    folder.chmod(0)
    with without_root():
        assert admits(keys) == [None, None] and keys.required
    folder.chmod(0o700)
    assert ["link to nothing" in line for line in complaints()] == [True, False]


@pytest.mark.parametrize(
    "link, way", [("folder", "folder/client-keys"), ("way", "way/folder/client-keys")]
)
def test_a_parent_folder_that_is_a_dangling_link_admits_no_client(tmp_path, complaints, link, way):
    (tmp_path / link).symlink_to("not-mounted")
    keys = ClientKeys(tmp_path / way)
    assert admits(keys) == [None, None] and keys.required
    assert "it is a link to nothing" in complaints()[0]


def test_without_a_folder_no_key_is_required(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for way in (
        "none/client-keys",
        "none/none/client-keys",
        "link/client-keys",
        "link/none/client-keys",
    ):
        assert not ClientKeys(tmp_path / way).required


def test_a_failed_read_admits_no_client_and_is_not_remembered(path, complaints):
    put(path, f"a {DIGEST}")
    keys = ClientKeys(path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The process can open nothing.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        # The file has not changed.
        assert admits(keys) == ["a", None]
        path.rename(path.with_name("other"))
        # The time of change is another.
        path.with_name("other").rename(path)
        assert admits(keys) == admits(keys) == [None, None]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert admits(keys) == ["a", None]
    assert len(complaints()) == 1 and "Too many open files" in complaints()[0]


def test_without_a_file_and_a_descriptor_no_key_is_required(path, complaints):
    """Without a descriptor, an open fails before it searches for the file."""
    keys = ClientKeys(path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        assert admits(keys) == [None, None] and not keys.required
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert complaints() == []


def test_a_missing_file_admits_no_client_and_is_logged_once(path, complaints):
    put(path, f"a {DIGEST}")
    keys = ClientKeys(path)
    path.unlink()
    for _ in range(3):
        assert admits(keys) == [None, None] and keys.required
    assert [line.partition(";")[0] for line in complaints()] == [f"{path} does not exist"]


def test_an_unreadable_file_admits_no_client(open_folder, complaints):
    path = open_folder / "client-keys"
    put(path, f"a {DIGEST}")
    path.chmod(0)
    with without_root():
        keys = ClientKeys(path)
        assert admits(keys) == [None, None] and keys.required
    assert len(complaints()) == 1 and "Permission denied" in complaints()[0]
    path.chmod(0o600)
    assert admits(keys) == ["a", None]


def test_a_folder_that_cannot_be_searched_admits_no_client(open_folder, complaints):
    put(open_folder / "client-keys", f"a {DIGEST}")
    open_folder.chmod(0)
    with without_root():
        keys = ClientKeys(open_folder / "client-keys")
        assert admits(keys) == [None, None] and keys.required
    open_folder.chmod(0o700)
    assert len(complaints()) == 1 and "Permission denied" in complaints()[0]


def test_each_new_error_is_logged(path, complaints):
    put(path, f"a {DIGEST}")
    keys = ClientKeys(path)
    for make in (make_file("x"), make_directory, make_file("")):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        admits(keys)
    assert len(complaints()) == 3


def test_a_proxy_that_has_required_a_key_requires_one_until_its_end(path):
    put(path, f"a {DIGEST}")
    keys = ClientKeys(path)
    put(path, "# the last one was removed")
    assert admits(keys) == [None, None] and keys.required
    path.unlink()
    assert admits(keys) == [None, None] and keys.required


def test_a_named_file_that_does_not_exist_admits_no_client(path, complaints):
    keys = ClientKeys(path, required=True)
    assert admits(keys) == [None, None] and keys.required and len(complaints()) == 1


def test_a_link_with_a_new_target_is_read_again(path):
    """A Secret that Kubernetes mounts is a link, and a change gives it another target."""
    for number, digest in enumerate((DIGEST, OTHER)):
        put(path.with_name(str(number)), f"a {digest}")
    path.symlink_to("0")
    keys = ClientKeys(path)
    assert admits(keys) == ["a", None]
    path.with_name("link").symlink_to("1")
    path.with_name("link").replace(path)
    assert admits(keys) == [None, "a"]

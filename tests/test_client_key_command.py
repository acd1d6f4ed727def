"""xai-client-key, as a process: a key is shown once and stored hashed, and no two undo each other."""

import concurrent.futures
import fcntl
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT
from forked_process import run_python
from strace import needs_strace, strace

from xaiproxy import client_keys, key_uses

COMMAND = [sys.executable, "-W", "error", "-m", "xaiproxy.client_key_command"]
DIGEST = client_keys.digest("a-key")
OTHER = client_keys.digest("another-key")


RUN_ALL = """
import contextlib, io, json, sys
from xaiproxy.client_key_command import main
answers = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
    answers.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""


class Folder:
    """An empty home with a token folder, and the command in it."""

    def __init__(self, home: Path):
        self.home = home
        self.path = home / ".xai-proxy" / "client-keys"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "TZ": "UTC",
        }

    def start(self, *arguments: str, prefix: tuple[str, ...] = (), **how) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*prefix, *COMMAND, *arguments],
            env=self.environ,
            cwd=self.home,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **how,
        )

    def run(self, *arguments: str, **how) -> tuple[int, str, str]:
        if not how:
            done = run_python(
                "xaiproxy.client_key_command",
                ["-m", "xaiproxy.client_key_command", *arguments],
                cwd=self.home,
                environ=self.environ,
                timeout=20,
            )
            return done.returncode, done.stdout, done.stderr
        with self.start(*arguments, **how) as process:
            out, err = process.communicate(timeout=20)
        return process.returncode, out, err

    def add(self, name: str) -> str:
        """Add a key, and return it."""
        code, out, err = self.run("add", name)
        assert (code, out.count("\n")) == (0, 1) and err.count("\n") <= 2
        return out.strip()

    def names(self) -> list[str]:
        """The names that `list` prints."""
        code, out, err = self.run("list")
        assert (code, err) == (0, "")
        return [line.split()[0] for line in out.splitlines()]

    def run_all(self, *lines: list[str]) -> list[tuple[int, str, str]]:
        """Run several commands in one process, which is ten times as fast."""
        done = subprocess.run(
            [*COMMAND[:-2], "-c", RUN_ALL, json.dumps(lines)],
            env=self.environ,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return [tuple(answer) for answer in json.loads(done.stdout)]

    def refusal(self, *arguments: str, code: int) -> str:
        """The one sentence of a command that fails and changes nothing."""
        before = self.path.read_bytes() if self.path.is_file() else None
        got, out, err = self.run(*arguments)
        assert (got, out, err.count("\n")) == (code, "", 1), err
        assert err.startswith("xai-client-key: ") and "Traceback" not in err
        assert before == (self.path.read_bytes() if self.path.is_file() else None)
        return err

    def put(self, text: str) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(text)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def test_a_key_is_shown_once_on_stdout_and_stored_hashed(folder):
    code, key, err = folder.run("add", "laptop")
    # 256 bits.
    assert code == 0 and re.fullmatch(r"xaip_[A-Za-z0-9_-]{43}\n", key)
    key = key.strip()
    assert key not in err and "laptop" in err
    text = folder.path.read_text()
    assert client_keys.parse(text) == {"laptop": hashlib.sha256(key.encode()).hexdigest()}
    assert key not in text and key.removeprefix("xaip_") not in text
    assert client_keys.ClientKeys(folder.path).name_of(key) == "laptop"
    assert folder.names() == ["laptop"]
    assert {path.name for path in folder.path.parent.iterdir()} == {
        "client-keys",
        "client-keys.lock",
    }


def test_keys_are_added_listed_and_removed(folder):
    assert folder.run("list") == (0, "", f"There is no client key in {folder.path}.\n")
    keys = {name: folder.add(name) for name in ("b", "a", "x" * 64)}
    assert len(set(keys.values())) == 3
    assert folder.names() == ["b", "a", "x" * 64]
    assert folder.run("remove", "b") == (0, "", "The key of b is refused from now on.\n")
    assert folder.names() == ["a", "x" * 64]
    seen = client_keys.ClientKeys(folder.path)
    assert [seen.name_of(key) for key in keys.values()] == [None, "a", "x" * 64]


def test_removing_the_last_key_keeps_the_file_so_that_no_client_is_admitted(folder):
    folder.put(f"a {DIGEST}\n")
    seen = client_keys.ClientKeys(folder.path)
    status, _, err = folder.run("remove", "a")
    assert (
        status == 0
        and "all clients are refused now" in err
        and f"remove {folder.path} and restart" in err
    )
    seen.refresh()
    assert (
        folder.path.exists() and seen.required and client_keys.parse(folder.path.read_text()) == {}
    )


@pytest.mark.parametrize("umask", [0, 0o077])
def test_the_file_is_private_with_any_umask(folder, umask):
    folder.run("add", "a", umask=umask)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.parent.stat().st_mode) == 0o700


def test_a_file_that_others_could_read_becomes_private(folder):
    folder.put(f"a {DIGEST}\n")
    folder.path.chmod(0o644)
    # The leftover of a command that was killed.
    left = folder.path.with_name("client-keys.new")
    left.write_text("half")
    left.chmod(0o666)
    folder.add("b")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o600
    assert list(client_keys.parse(folder.path.read_text())) == ["a", "b"] and not left.exists()


def test_the_file_is_beside_the_token_file_or_at_the_path_of_the_setting(folder):
    folder.environ["XAI_PROXY_TOKEN_PATH"] = str(folder.home / "elsewhere" / "t.json")
    folder.run("add", "a")
    assert (folder.home / "elsewhere" / "client-keys").exists()
    folder.environ["XAI_PROXY_CLIENT_KEYS_FILE"] = str(folder.home / "named")
    folder.run("add", "a")
    assert (folder.home / "named").exists()


def test_the_first_key_closes_the_proxy_to_clients_without_one(folder):
    notice = "clients without a key are refused from now on, also by a proxy that is running"
    assert notice in folder.run("add", "a")[2]
    assert notice not in folder.run("add", "b")[2]
    folder.run("remove", "a")
    folder.run("remove", "b")
    assert notice in folder.run("add", "c")[2]


# made, and last used

MINUTE = r"20\d\d-\d\d-\d\d \d\d:\d\d"


def minute(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))


def test_a_key_has_the_time_at_which_it_was_made_in_a_comment_above_it(folder):
    began = time.time()
    folder.put(f"# by hand\r\nold {DIGEST}")
    folder.add("new")
    first, old, made, new = folder.path.read_text().splitlines()
    assert (first, old) == ("# by hand", f"old {DIGEST}") and new.startswith("new ")
    at = client_keys.made_time(made)
    assert made.startswith("# made 20") and int(began) <= at <= time.time()
    assert client_keys.made_at(folder.path.read_text()) == {"new": at}
    assert folder.run("list")[1] == (
        f"old  made unknown           last used not recorded\n"
        f"new  made {minute(at)}  last used not recorded\n"
    )


def test_removing_a_key_removes_its_time_and_no_other_comment(folder):
    folder.put(
        f"# of the team\na {DIGEST}\n# made 2026-01-02T03:04:05Z\nb {DIGEST}\n"
        f"# made 2026-01-02T03:04:06Z\nc {DIGEST}\n"
    )
    folder.run("remove", "a")
    folder.run("remove", "b")
    text = f"# of the team\n# made 2026-01-02T03:04:06Z\nc {DIGEST}\n"
    assert folder.path.read_text() == text
    assert "c  made 2026-01-02 03:04  " in folder.run("list")[1]


def test_the_former_versions_parser_reads_a_file_with_times(folder):
    """A comment line begins with #; each other line is a name and a digest."""
    folder.add("a")
    folder.add("b")
    lines = [line for line in folder.path.read_text().splitlines() if not line.startswith("#")]
    assert [re.fullmatch(r"([ab]) [0-9a-f]{64}", line)[1] for line in lines] == ["a", "b"]


def test_list_shows_when_a_key_was_last_used(folder):
    folder.put(f"a {DIGEST}\n")
    key_uses.save(folder.path, {DIGEST: 1_700_000_000.5}, [DIGEST])
    assert folder.run("list")[1] == "a  made unknown           last used 2023-11-14 22:13\n"


def test_a_name_that_gets_another_key_starts_anew(folder):
    folder.put(f"a {DIGEST}\nb {OTHER}\n")
    key_uses.save(folder.path, dict.fromkeys((DIGEST, OTHER), 1_700_000_000), [DIGEST, OTHER])
    folder.run("remove", "a")
    assert key_uses.load(folder.path) == {OTHER: 1_700_000_000}
    folder.add("a")
    lines = folder.run("list")[1].splitlines()
    assert [line.partition("last used ")[2] for line in lines] == [
        "2023-11-14 22:13",
        "not recorded",
    ]


def test_a_key_is_removed_although_its_last_use_cannot_be(folder):
    folder.put(f"a {DIGEST}\nb {OTHER}\n")
    key_uses.save(folder.path, {DIGEST: 1_700_000_000}, [DIGEST])
    folder.path.with_name("client-keys.used.new").mkdir()
    assert folder.run("remove", "a") == (0, "", "The key of a is refused from now on.\n")
    assert folder.names() == ["b"]


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    paths = [folder, *folder.rglob("*")]
    found = {str(path): path.lstat() for path in paths}
    return {path: (at.st_ino, at.st_mtime_ns, at.st_ctime_ns) for path, at in found.items()}


@pytest.mark.parametrize("put", [False, True])
def test_list_writes_nothing(folder, put):
    """Neither is the folder made, nor a lock file, nor is the file touched."""
    if put:
        folder.put(f"a {DIGEST}\n")
        key_uses.save(folder.path, {DIGEST: 1_700_000_000}, [DIGEST])
    before = snapshot(folder.home)
    assert folder.run("list")[0] == 0
    assert snapshot(folder.home) == before


# errors

WRONG_LINES = [
    ([], "add | list | remove"),
    (["add"], "NAME"),
    (["remove"], "NAME"),
    (["frob"], "frob"),
    (["list", "a"], "unrecognized"),
    (["add", "a", "b"], "unrecognized"),
    (["add", "-x"], "NAME"),
    (["--frob"], "add | list | remove"),
]


def test_a_wrong_command_line_is_64(folder):
    assert "add | list | remove" in folder.refusal(code=64)
    answers = folder.run_all(*(arguments for arguments, _ in WRONG_LINES))
    for (arguments, message), (code, out, err) in zip(WRONG_LINES, answers, strict=True):
        assert (code, out, err.count("\n")) == (64, "", 1) and message in err, arguments
        assert re.fullmatch(r"(xai-client-key( add| remove)?): [^{}]+; see \1 --help\n", err)


def test_a_name_that_the_file_cannot_hold_is_64(folder):
    assert "'a ' cannot be a name" in folder.refusal("add", "a ", code=64)
    names = [
        "",
        " ",
        " a",
        "a\t",
        "a b",
        "a\nb",
        "a\n",
        "é",
        "a/b",
        "a:b",
        "#a",
        "x" * 65,
        "\x1b[31m",
    ]
    for name, (code, out, err) in zip(
        names, folder.run_all(*(["add", name] for name in names)), strict=True
    ):
        assert (code, out, err.count("\n")) == (64, "", 1) and repr(name) in err
    assert not folder.path.exists()


def test_a_name_is_added_once_and_removed_once(folder):
    folder.put(f"a {DIGEST}\n")
    assert "a already has a key; remove it first" in folder.refusal("add", "a", code=64)
    assert "b has no key" in folder.refusal("remove", "b", code=64)


@pytest.mark.parametrize(
    "text", [b"half a line", f"a {DIGEST}\na {DIGEST}\n".encode(), b"a \xff\n"]
)
def test_a_file_that_does_not_parse_is_78_and_not_written_over(folder, text):
    folder.put("")
    folder.path.write_bytes(text)
    for code, out, sentence in folder.run_all(["add", "b"], ["remove", "a"], ["list"]):
        assert (code, out, sentence.count("\n")) == (78, "", 1)
        assert f"{folder.path} cannot be used" in sentence and "correct or remove it" in sentence
        assert "half a" not in sentence
    assert folder.path.read_bytes() == text


def test_a_setting_that_makes_no_sense_is_78(folder):
    folder.environ["XAI_PROXY_PORT"] = "x"
    assert "XAI_PROXY_PORT" in folder.refusal("list", code=78)


def test_a_folder_that_cannot_be_written_is_75(folder):
    (folder.home / ".xai-proxy").write_text("a file where the folder should be")
    assert "nothing was changed" in folder.refusal("remove", "a", code=75)


def test_a_directory_in_the_files_place_is_78(folder):
    folder.path.mkdir(parents=True)
    assert "it is not a file" in folder.refusal("add", "a", code=78)


def test_a_fifo_in_the_files_place_is_78_at_once(folder):
    folder.path.parent.mkdir()
    os.mkfifo(folder.path)
    for code, out, sentence in folder.run_all(["add", "b"], ["remove", "a"], ["list"]):
        assert (code, out) == (78, "") and "it is not a file" in sentence


@pytest.mark.parametrize("target", ["kept-elsewhere", "nowhere"])
def test_a_link_is_refused_and_not_changed(folder, target):
    """Neither is its target written, nor the link replaced, whose target the proxy would then
    not see.
    """
    folder.path.parent.mkdir()
    kept = folder.path.with_name("kept-elsewhere")
    kept.write_text(f"a {DIGEST}\n")
    folder.path.symlink_to(target)
    for code, out, sentence in folder.run_all(["add", "b"], ["remove", "a"]):
        assert (code, out, sentence.count("\n")) == (78, "", 1)
        assert f"{folder.path} is a symbolic link to '{target}' and is left alone" in sentence
    assert kept.read_text() == f"a {DIGEST}\n" and os.readlink(folder.path) == target
    assert {path.name for path in folder.path.parent.iterdir()} == {
        "client-keys",
        "client-keys.lock",
        "kept-elsewhere",
    }
    code, out, sentence = folder.run("list")
    assert (code, out.split()[:1]) == ((0, ["a"]) if target == "kept-elsewhere" else (78, []))
    assert target == "kept-elsewhere" or "it is a link to nothing" in sentence


def test_a_link_in_the_locks_place_is_not_followed(folder):
    folder.path.parent.mkdir()
    lock = folder.path.with_name("client-keys.lock")
    (folder.home / "precious").write_text("precious")
    for target in ("precious", "nowhere"):
        lock.symlink_to(folder.home / target)
        assert f"{lock} cannot be written" in folder.refusal("add", "a", code=75)
        lock.unlink()
    assert (folder.home / "precious").read_text() == "precious" and not (
        folder.home / "nowhere"
    ).exists()


FULL = """
mount -t tmpfs -o size=8k none "$1" && cd "$1" || exit 99
export XAI_PROXY_TOKEN_PATH="$1/tokens.json"; shift
"$@" add first >/dev/null 2>&1 || exit 98
cat client-keys >&2
head -c 100000 /dev/zero >filler 2>/dev/null
"$@" add second; code=$?
cat client-keys >&2
rm filler
"$@" add second >/dev/null 2>&1 && "$@" list >&2
exit $code
"""


def test_a_full_disk_is_75_and_leaves_the_file_as_it_was(folder):
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    ).returncode:
        pytest.skip("unshare -rm cannot mount here")
    script = ("unshare", "-rm", "sh", "-c", FULL, "sh", str(folder.home))
    code, out, err = folder.run(prefix=script)
    before, sentence, after, names = re.fullmatch(
        r"(#.*\n#.*\n.*\n)(xai-.*\n)(#.*\n#.*\n.*\n)(.*\n.*\n)", err
    ).groups()
    assert (code, out) == (75, "")
    assert "No space left on device" in sentence and "nothing was changed" in sentence
    assert before == after
    assert [line.split()[0] for line in names.splitlines()] == ["first", "second"]


@needs_strace
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_command_that_is_killed_leaves_the_old_file_and_no_lock(folder, call):
    folder.put(f"a {DIGEST}\n")
    kill = strace(
        os.devnull,
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:signal=KILL:when=1",
        paths=[folder.path.with_name("client-keys.new")],
        few_stops=False,
    )
    # The key is shown right before the rename.
    code, out, _ = folder.run("add", "b", prefix=kill)
    assert (code, bool(out)) == (
        -signal.SIGKILL,
        call == "rename",
    )
    assert (
        folder.path.with_name("client-keys.new").exists()
        and folder.path.read_text() == f"a {DIGEST}\n"
    )
    folder.add("c")
    assert list(client_keys.parse(folder.path.read_text())) == ["a", "c"]


# several commands at once


def test_twenty_adds_at_once_lose_no_key_and_the_file_is_never_half_written(folder):
    folder.put(f"first {DIGEST}\n")
    seen = client_keys.ClientKeys(folder.path)
    with concurrent.futures.ThreadPoolExecutor(20) as threads:
        started = [threads.submit(folder.run, "add", f"n{number}") for number in range(20)]
        while not all(one.done() for one in started):
            seen.refresh()
            assert seen.name_of("a-key") == "first"
            # This leaves CPU time for the twenty commands.
            time.sleep(0.001)
    keys = []
    for one in started:
        code, out, _ = one.result()
        keys.append(out.strip())
        assert code == 0
    seen.refresh()
    assert [seen.name_of(key) for key in keys] == [f"n{number}" for number in range(20)]


def test_a_command_that_waits_for_another_can_be_interrupted(folder):
    folder.put(f"a {DIGEST}\n")
    with open(folder.path.with_name("client-keys.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with folder.start("add", "b") as process:
            deadline = time.monotonic() + 10
            while not re.search(rf"-> FLOCK .* {process.pid} ", Path("/proc/locks").read_text()):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "\nxai-client-key: interrupted\n")
    assert folder.path.read_text() == f"a {DIGEST}\n"


def test_help_shows_worked_examples(folder):
    answers = folder.run_all(["--help"], ["add", "--help"])
    for code, out, err in answers:
        assert (code, err) == (0, "") and out.startswith("  xai-client-key add laptop ")
    assert "usage: xai-client-key add " in answers[1][1]

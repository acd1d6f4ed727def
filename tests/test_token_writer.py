"""What is written to tokens.json: one way onto the disk, left-overs, the rehearsed save.

System calls fail for real here: strace makes the kernel return the error at the n-th call.
"""

import concurrent.futures
import json
import os
import re
import shutil
import stat

import pytest
from forked_process import run_python
from strace import attach, needs_strace
from token_files import NEW, OLD, files, make_store, save

from xaiproxy import errors, token_json, token_writer, tokens
from xaiproxy.tokens import fingerprint


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


def put_leftover(store, text):
    store.new_path.write_text(text)


# saving


def test_a_save_is_0600_with_any_umask_and_leaves_no_other_file(store):
    umask = os.umask(0)
    try:
        save(store, OLD)
    finally:
        os.umask(umask)
    assert store.load() == OLD
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.lock_path.stat().st_mode) == 0o600
    assert files(store) == ["tokens.json", "tokens.json.lock"]


def test_a_save_names_the_refresh_token_that_it_succeeds(store):
    save(store, OLD)
    assert json.loads(store.path.read_text())["replaces"] is None
    save(store, NEW)
    assert json.loads(store.path.read_text())["replaces"] == fingerprint("old-refresh")


def test_unknown_keys_survive_a_rewrite(store):
    store.path.write_text(
        json.dumps({"access_token": "a", "expires_at": 1, "theirs": {"deep": [None, "é"]}})
    )
    save(store, store.load())
    assert json.loads(store.path.read_text())["theirs"] == {"deep": [None, "é"]}


@pytest.mark.parametrize("leftover", [False, True])
def test_a_file_that_does_not_parse_is_kept_aside(store, leftover, caplog):
    store.path.write_text("{corrupt")
    # The leftover of a login that was killed before its rename.
    if leftover:
        put_leftover(store, token_json.to_json(NEW, None))
        with token_writer.locked(store, 0):
            pass
    else:
        save(store, NEW)
    assert store.load() == NEW
    [aside] = [name for name in files(store) if re.fullmatch(r"tokens\.json\.corrupt-\d+", name)]
    assert (store.path.parent / aside).read_text() == "{corrupt"
    assert aside in caplog.text


def test_remove_leaves_only_the_lock(store):
    save(store, OLD)
    store.ask_refresh("old")
    (store.path.parent / "tokens.json.corrupt-5").touch()
    # The leftover of a proxy that was killed while it wrote its note.
    (store.path.parent / "tokens.json.refused.0123").touch()
    (store.path.parent / "client-keys").touch()
    (store.path.parent / "tokens.json.txt").touch()
    with token_writer.locked(store, 0) as writer:
        writer.save(NEW)
        put_leftover(store, token_json.to_json(OLD, fingerprint("new-refresh")))
        writer.remove()
    assert files(store) == ["client-keys", "tokens.json.lock", "tokens.json.txt"]
    with token_writer.locked(store, 0) as writer:
        writer.remove()


def test_a_folder_in_the_files_place_is_an_error(store):
    os.mkdir(store.path)
    with pytest.raises(errors.StorageError, match="is not a file"):
        save(store, NEW)


# leftovers


@pytest.mark.parametrize(
    "text, adopted",
    [
        (token_json.to_json(NEW, fingerprint("old-refresh")), True),
        # Killed before it was cut off.
        (
            token_json.to_json(NEW, fingerprint("old-refresh")) + " " * token_writer.RESERVE,
            True,
        ),
        # Of a login that has been replaced since.
        (
            token_json.to_json(NEW, fingerprint("another")),
            False,
        ),
        (token_json.to_json(NEW, None), False),
        (token_json.to_json(NEW, fingerprint("old-refresh"))[:-3], False),
        (" " * token_writer.RESERVE, False),
        ("", False),
    ],
)
def test_a_leftover_is_adopted_only_if_it_is_whole_and_succeeds_the_login(
    store, text, adopted, caplog
):
    save(store, OLD)
    put_leftover(store, text)
    with token_writer.locked(store, 0):
        assert store.load() == (NEW if adopted else OLD)
    assert files(store) == ["tokens.json", "tokens.json.lock"]
    assert ("left behind" in caplog.text) is adopted


@pytest.mark.parametrize("mark, adopted", [(None, True), (fingerprint("old-refresh"), False)])
def test_after_a_sign_out_only_a_leftover_first_login_is_adopted(store, mark, adopted):
    put_leftover(store, token_json.to_json(NEW, mark))
    with token_writer.locked(store, 0):
        assert store.path.exists() is adopted
    assert not store.new_path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_another_users_leftover_is_an_error_and_kept(store):
    save(store, OLD)
    put_leftover(store, token_json.to_json(NEW, fingerprint("old-refresh")))
    os.chown(store.new_path, 12345, 12345)
    with pytest.raises(errors.StorageError, match="user 12345"), token_writer.locked(store, 0):
        pass
    # It may be the only copy of that user's login.
    assert store.load() == OLD and store.new_path.exists()


def test_a_leftover_does_not_replace_a_link(store):
    (store.path.parent / "real.json").write_text(token_json.to_json(OLD, None))
    store.path.symlink_to("real.json")
    put_leftover(store, token_json.to_json(NEW, fingerprint("old-refresh")))
    with token_writer.locked(store, 0):
        assert store.path.is_symlink()


@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.symlink("tokens.json", path)])
def test_any_other_kind_of_file_in_the_leftovers_place_is_an_error(store, make):
    save(store, OLD)
    make(store.new_path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.StorageError, match="tokens.json.new cannot be written"):
        save(store, NEW)
    assert store.load() == OLD and len(os.listdir("/proc/self/fd")) == before


# the rehearsed save


def test_a_rehearsal_leaves_the_login_and_room_for_its_successor(store):
    save(store, OLD)
    with token_writer.locked(store, 0) as writer:
        inode = store.path.stat().st_ino
        reserved = writer.rehearse(OLD)
        # It was really renamed.
        assert store.load() == OLD and store.path.stat().st_ino != inode
        status = store.new_path.stat()
        # The file has no hole.
        assert status.st_size == status.st_blocks * 512 == 65536
        assert stat.S_IMODE(status.st_mode) == 0o600
        reserved.commit(NEW)
        assert store.load() == NEW and store.path.stat().st_ino == status.st_ino
    assert json.loads(store.path.read_text())["replaces"] == fingerprint("old-refresh")
    assert files(store) == ["tokens.json", "tokens.json.lock"]


def test_a_discarded_rehearsal_leaves_no_file(store):
    save(store, OLD)
    before = len(os.listdir("/proc/self/fd"))
    with token_writer.locked(store, 0) as writer:
        writer.rehearse(OLD).discard()
        assert files(store) == ["tokens.json", "tokens.json.lock"]
        writer.rehearse(OLD).commit(NEW)
    assert len(os.listdir("/proc/self/fd")) == before and store.load() == NEW


def test_a_login_removed_by_hand_meanwhile_is_not_restored(store):
    save(store, OLD)
    with token_writer.locked(store, 0) as writer:
        reserved = writer.rehearse(OLD)
        shutil.rmtree(store.path.parent)
        store.path.parent.mkdir()
        with pytest.raises(errors.LoginUnusable, match="removed while"):
            reserved.commit(NEW)
    assert files(store) == []


def test_a_login_written_without_the_lock_meanwhile_is_kept(store):
    save(store, OLD)
    before = len(os.listdir("/proc/self/fd"))
    with token_writer.locked(store, 0) as writer:
        reserved = writer.rehearse(OLD)
        theirs = store.path.with_name("theirs")
        theirs.write_text(token_json.to_json(tokens.Login("theirs", 4000, "their-refresh"), None))
        theirs.rename(store.path)
        with pytest.raises(errors.LoginUnusable, match="replaced or"):
            reserved.commit(NEW)
    assert store.load().access_token == "theirs" and files(store) == [
        "tokens.json",
        "tokens.json.lock",
    ]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "write", [lambda writer: writer.rehearse(OLD), lambda writer: writer.save(OLD, over=OLD)]
)
def test_a_login_written_before_the_rehearsal_is_kept(store, write):
    save(store, NEW)
    before = len(os.listdir("/proc/self/fd"))
    with (
        token_writer.locked(store, 0) as writer,
        pytest.raises(errors.LoginUnusable, match="replaced or"),
    ):
        write(writer)
    assert store.load() == NEW and files(store) == ["tokens.json", "tokens.json.lock"]
    assert len(os.listdir("/proc/self/fd")) == before


def tidied_away(store):
    store.new_path.unlink()


def moved(store):
    store.new_path.rename(store.path.parent.parent / "elsewhere")


def replaced_by_a_strangers(store):
    store.new_path.unlink()
    store.new_path.write_text(
        token_json.to_json(tokens.Login("theirs", 4000, "their-refresh"), None)
    )


def replaced_by_a_link(store):
    (store.path.parent.parent / "theirs").write_text("theirs")
    store.new_path.unlink()
    store.new_path.symlink_to(store.path.parent.parent / "theirs")


@pytest.mark.parametrize(
    "change", [tidied_away, moved, replaced_by_a_strangers, replaced_by_a_link]
)
def test_a_reserve_that_was_removed_or_replaced_is_made_again(store, change):
    save(store, OLD)
    with token_writer.locked(store, 0) as writer:
        reserved = writer.rehearse(OLD)
        change(store)
        reserved.commit(NEW)
    assert store.load() == NEW and files(store) == ["tokens.json", "tokens.json.lock"]
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600 and not store.path.is_symlink()


def test_a_discard_does_not_remove_the_file_of_another_process(store):
    save(store, OLD)
    with token_writer.locked(store, 0) as writer:
        reserved = writer.rehearse(OLD)
        replaced_by_a_strangers(store)
        reserved.discard()
    assert store.new_path.exists()


def test_a_failed_save_can_be_retried_until_it_succeeds(store):
    save(store, OLD)
    with token_writer.locked(store, 0) as writer:
        reserved = writer.rehearse(OLD)
        store.new_path.unlink()
        # No process can make a file there.
        store.new_path.mkdir()
        for _ in range(3):
            with pytest.raises(errors.StorageError, match="Is a directory"):
                reserved.commit(NEW)
            assert store.load() == OLD and not reserved.renamed
        store.new_path.rmdir()
        reserved.commit(NEW)
    assert store.load() == NEW


def test_a_rename_that_was_done_and_reported_as_failed_counts(store):
    save(store, OLD)
    with token_writer.locked(store, 0) as writer:
        reserved = writer.rehearse(OLD)
        reserved._write(NEW)
        os.rename(store.new_path, store.path)
        reserved.commit(NEW)
        assert reserved.renamed
    assert store.load() == NEW and files(store) == ["tokens.json", "tokens.json.lock"]


def test_a_removed_folder_is_a_sign_out(store):
    save(store, OLD)
    with token_writer.locked(store, 0) as writer:
        reserved = writer.rehearse(OLD)
        shutil.rmtree(store.path.parent)
        with pytest.raises(errors.LoginUnusable, match="removed while"):
            reserved.commit(NEW)
    assert not store.path.parent.exists()


# each system call of a save fails

CHILD = """
import os, pathlib, sys, time
from xaiproxy import config, errors, token_store, token_writer, tokens
store = token_store.TokenStore(config.from_environ({"XAI_PROXY_TOKEN_PATH": sys.argv[1]}, dotenv_path=os.devnull))
with token_writer.locked(store, 0) as writer:
    login = store.load()
    reserved = writer.rehearse(login)
    store.path.with_name("spent").touch()
    for attempt in range(3):
        try:
            reserved.commit(tokens.Login("new", 3000, "new-refresh", extra={"theirs": 1}))
            break
        except errors.StorageError as error:
            print("again:", error)
"""
SAVING = "openat,write,fsync,ftruncate,rename,unlink"


def run_child(store, *inject, leftover=""):
    paths = [store.path, store.new_path, store.lock_path, store.path.parent]
    save(store, OLD)
    if leftover:
        put_leftover(store, leftover)
    log = store.path.parent.parent / f"{store.path.parent.name}.strace"
    script = log.with_suffix(".py")
    script.write_text(CHILD)
    done = run_python(
        "xaiproxy.refresher.process",
        [str(script), str(store.path)],
        cwd="/",
        environ={},
        timeout=30,
        trace=lambda pid: attach(pid, log, "-e", f"trace={SAVING}", *inject, paths=paths),
    )
    return done, re.findall(rf"^\d+ +({SAVING.replace(',', '|')})\(", log.read_text(), re.MULTILINE)


def every_call(tmp_path):
    """(name, n) of each system call that saves a login, in order."""
    done, calls = run_child(make_store(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    return [(name, calls[: index + 1].count(name)) for index, name in enumerate(calls)]


@needs_strace
def test_a_successor_is_synced_whole_before_its_rename_and_the_folder_after_it(tmp_path):
    (tmp_path / "whole").mkdir()
    calls = [name for name, _ in every_call(tmp_path) if name not in ("openat", "unlink")]
    assert calls[-5:] == ["write", "ftruncate", "fsync", "rename", "fsync"]


@needs_strace
def test_a_leftover_is_synced_before_it_is_adopted(tmp_path):
    """Its writer may have been killed before its sync."""
    (tmp_path / "left").mkdir()
    store = make_store(tmp_path / "left")
    done, calls = run_child(store, leftover=token_json.to_json(NEW, fingerprint("old-refresh")))
    assert done.returncode == 0, done.stderr
    assert [name for name in calls if name not in ("openat", "unlink")][:3] == [
        "fsync",
        "rename",
        "fsync",
    ]


@needs_strace
def test_the_file_is_locked_where_a_folder_cannot_be(tmp_path):
    (tmp_path / "folder").mkdir()
    done, _ = run_child(
        make_store(tmp_path / "folder"),
        "-e",
        "trace=flock",
        "-e",
        "inject=flock:error=EOPNOTSUPP:when=2",
    )
    assert done.returncode == 0, done.stderr
    assert "EOPNOTSUPP" in (tmp_path / "folder.strace").read_text()
    (tmp_path / "neither").mkdir()
    done, _ = run_child(
        make_store(tmp_path / "neither"), "-e", "trace=flock", "-e", "inject=flock:error=EOPNOTSUPP"
    )
    assert "tokens.json.lock cannot be written: Operation not supported" in done.stderr


@needs_strace
def test_a_folder_that_cannot_be_synced_after_the_rename_is_an_error_of_its_own(tmp_path):
    """The file has the login by then, and the second attempt syncs it."""
    (tmp_path / "whole").mkdir()
    last = [name for name, _ in every_call(tmp_path)].count("fsync")
    (tmp_path / "folder").mkdir()
    done, _ = run_child(
        make_store(tmp_path / "folder"), "-e", f"inject=fsync:error=EIO:when={last}"
    )
    assert done.returncode == 0 and "is made, but a power cut could undo it" in done.stdout


@needs_strace
def test_an_error_of_any_system_call_loses_no_login(tmp_path):
    (tmp_path / "whole").mkdir()
    calls = every_call(tmp_path)
    assert {name for name, _ in calls} == set(SAVING.split(",")) and len(calls) > 20

    def fail(call) -> str:
        name, n = call
        (tmp_path / f"{name}{n}").mkdir()
        store = make_store(tmp_path / f"{name}{n}")
        done, _ = run_child(store, "-e", f"inject={name}:error=EIO:when={n}")
        spent = (store.path.parent / "spent").exists()
        # Either nothing was spent and one sentence has the reason, or it was saved, by the second attempt
        # at the latest.
        if done.returncode:
            assert re.search(
                r"^xaiproxy\.errors\.\w+: .*Input/output error", done.stderr, re.MULTILINE
            ), done.stderr
        assert spent is (done.returncode == 0) and done.stdout.count("again:") <= 1
        for _ in range(2):
            assert store.load() == (NEW if spent else OLD), call
            assert {name for name in files(store) if name != "spent"} == {
                "tokens.json",
                "tokens.json.lock",
            }
            with token_writer.locked(store, 0):
                pass
        return "saved again" if done.stdout else "saved" if spent else "not spent"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert set(pool.map(fail, calls)) == {"not spent", "saved", "saved again"}

"""Replacing a file durably: the new file is the process's own, and its folder is synced if
possible.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from checkout import ROOT

from xaiproxy.durable_file import NewFile

strace = pytest.mark.skipif(
    shutil.which("strace") is None
    or subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode,
    reason="strace is not installed, or not permitted here",
)


def test_a_file_of_another_process_made_at_the_same_moment_is_not_written(tmp_path):
    """Its content could be read by others, or its mode be open to them."""
    path = tmp_path / "new"
    done = threading.Event()

    def intrude():
        while not done.is_set():
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o644))

    intruder = threading.Thread(target=intrude)
    intruder.start()
    try:
        end = time.monotonic() + 20
        with pytest.raises(FileExistsError):
            # The two threads meet after some hundreds.
            while time.monotonic() < end:
                new = NewFile(path)
                mode = os.fstat(new.fd).st_mode
                new.close()
                assert not mode & 0o077
    finally:
        done.set()
        intruder.join()


def test_a_new_file_that_was_replaced_is_neither_renamed_nor_removed(tmp_path):
    new = NewFile(tmp_path / "new")
    new.write(b"ours")
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "theirs").rename(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="removed or replaced by another process"):
        new.rename(tmp_path / "file")
    new.remove()
    assert (tmp_path / "new").read_text() == "theirs" and not (tmp_path / "file").exists()


def test_a_shorter_content_replaces_all_of_the_former_one(tmp_path):
    new = NewFile(tmp_path / "new")
    new.write(b"x" * 100)
    new.write(b"short")
    new.rename(tmp_path / "file")
    new.remove()
    assert (tmp_path / "file").read_bytes() == b"short" and not (tmp_path / "new").exists()


@strace
@pytest.mark.parametrize(
    "error, code", [("EINVAL", 0), ("EIO", 75)], ids=["cannot be synced", "failed"]
)
@pytest.mark.parametrize("file", ["tokens.json", "client-keys"])
def test_a_folder_that_cannot_be_synced_on_its_file_system_needs_no_sync(
    tmp_path, file, error, code
):
    save = (
        "from xaiproxy import command, config, token_store, token_writer, tokens\n"
        "def save():\n"
        "    store = token_store.TokenStore(config.from_environ(os.environ))\n"
        "    with token_writer.locked(store, 0) as writer: writer.save(tokens.Login('a', 9))\n"
        "sys.exit(command.run('save', save))"
    )
    add = "from xaiproxy import client_key_command; sys.exit(client_key_command.main(['add', 'a']))"
    done = subprocess.run(
        [
            *("strace", "-o", os.devnull, f"-P{tmp_path}", "-e", f"inject=fsync:error={error}"),
            *(sys.executable, "-c", f"import os, sys; {save if file == 'tokens.json' else add}"),
        ],
        env={"XAI_PROXY_TOKEN_PATH": str(tmp_path / "tokens.json"), "PYTHONPATH": str(ROOT)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / file).exists() and ("power cut" in done.stderr) is bool(code)

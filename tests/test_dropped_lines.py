"""The number of log lines that supervisord has dropped."""

import os
import subprocess
import sys

import pytest

from xaiproxy import dropped_lines


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv(dropped_lines.PATH, raising=False)


def test_another_process_reads_the_number_that_was_written_last():
    fd = dropped_lines.publish()
    dropped_lines.write(fd, 1)
    dropped_lines.write(fd, 70000)
    program = "from xaiproxy import dropped_lines; print(dropped_lines.published())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert run.stdout == b"70000\n"


def test_without_supervisord_it_is_0():
    assert dropped_lines.published() == 0


def test_after_the_end_of_supervisord_it_is_0():
    fd = dropped_lines.publish()
    dropped_lines.write(fd, 5)
    os.close(fd)
    assert dropped_lines.published() == 0


def test_a_file_of_another_program_is_not_read(tmp_path, monkeypatch):
    for content in (b"", b"1234567", b"123456789"):
        (tmp_path / "other").write_bytes(content)
        monkeypatch.setenv(dropped_lines.PATH, str(tmp_path / "other"))
        assert dropped_lines.published() == 0
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setenv(dropped_lines.PATH, str(tmp_path / "fifo"))
    assert dropped_lines.published() == 0

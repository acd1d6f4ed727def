"""conf/launchd/xaiproxy.plist: its XML, and its command with a shell here. Not run on a Mac."""

import os
import plistlib
import stat
import subprocess

import pytest
from checkout import ROOT

JOB = plistlib.loads((ROOT / "conf" / "launchd" / "xaiproxy.plist").read_bytes())


@pytest.mark.parametrize("existing", [False, True])
def test_the_command_runs_xai_serve_in_the_token_folder_and_logs_to_a_file(tmp_path, existing):
    program = tmp_path / ".local" / "bin" / "xai-serve"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\npwd; echo an error >&2; exit 70\n")
    program.chmod(0o755)
    logs = tmp_path / "Library" / "Logs"
    logs.mkdir(parents=True)
    folder = tmp_path / ".xai-proxy"
    if existing:
        folder.mkdir(0o700)
    environ = {"HOME": str(tmp_path), "PATH": os.defpath}
    done = subprocess.run(JOB["ProgramArguments"], env=environ, cwd="/", timeout=20)
    assert done.returncode == 70
    assert (logs / "xaiproxy.log").read_text() == f"{folder}\nan error\n"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_failure_is_followed_by_a_start_and_a_normal_stop_is_not():
    assert JOB["RunAtLoad"] is True and JOB["KeepAlive"] == {"SuccessfulExit": False}

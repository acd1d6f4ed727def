"""Kubernetes manifests: rendered by kustomize, validated against schemas, and read as settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from xaiproxy import config

TOOLS = Path(sys.executable).parent
# The first release with native sidecars, and the newest that the tool knows.
RELEASES = ("1.29", "1.37")
# What the kubelet puts in place of a fieldRef.
FIELDS = {"metadata.namespace": "apps", "metadata.uid": "uid-of-the-pod"}
REFERENCE = re.compile(r"\$\((\w+)\)")


def rendered(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [TOOLS / "kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


def validate(objects: list[dict[str, Any]], release: str, folder: Path) -> None:
    """Assert that the schemas of a release know all fields. An API server would drop others."""
    file = folder / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    command = [TOOLS / "kubernetes-validate", "--strict", "-k", release, file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def environ(container: dict[str, Any]) -> dict[str, str]:
    """The variables of a container as its process gets them."""
    found: dict[str, str] = {}
    for each in container.get("env", []):
        value = each.get("value") or FIELDS[each["valueFrom"]["fieldRef"]["fieldPath"]]
        # Only variables before this one are known.
        found[each["name"]] = REFERENCE.sub(lambda name: found[name[1]], value)
    return found


def settings(container: dict[str, Any]) -> config.Config:
    return config.from_environ(environ(container), dotenv_path=os.devnull)

"""bin/image-check: each promise that an archive breaks is a line that begins with failed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import xaiproxy
from tests.image import archive, contents
from tests.image.report import Report

PACKAGES = "opt/xaiproxy/lib/python3.13/site-packages"
BYTECODE = f"{PACKAGES}/flask/__pycache__/app.cpython-313.pyc"
LIBRARY = f"{PACKAGES}/greenlet/_greenlet.cpython-313-x86_64-linux-gnu.so"
PIP = "usr/local/lib/python3.13/site-packages"
CONFIG = {
    "User": "10001:10001",
    "Volumes": {"/data": {}},
    "Labels": {
        "org.opencontainers.image.version": xaiproxy.__version__,
        "org.opencontainers.image.source": "https://example.org/xaiproxy",
        "org.opencontainers.image.licenses": "MIT",
    },
    "Healthcheck": {"Test": ["CMD", "python", "/opt/xaiproxy/healthcheck.py"]},
}
BASE = {f"{PIP}/pip/__init__.py": b"", "usr/local/bin/pip3.13": b""}
OURS = {
    "data/": b"",
    f"{PIP}/.wh.pip": b"",
    "usr/local/bin/.wh.pip3.13": b"",
    BYTECODE: b"\xf3\r\r\n\1\0\0\0" + bytes(8),
    LIBRARY: b"\x7fELF" + bytes(14) + b"\x3e\0",
    **{
        f"{PACKAGES}/{name.replace('-', '_')}-{version}.dist-info/": b""
        for name, version in [
            *(pin.split("==") for pin in contents.pinned() if not pin.startswith("setuptools=")),
            ("xaiproxy", xaiproxy.__version__),
        ]
    },
}


def packed(files: dict[str, bytes], owner: int = 0) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.rstrip("/"))
            entry.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            entry.uid, entry.size = owner, len(content)
            tar.addfile(entry, io.BytesIO(content))
    return written.getvalue()


def image(path: Path, ours: dict[str, bytes], owner: int = 0, **config: Any) -> Path:
    """An archive of a base and one layer."""
    document = {
        "architecture": "amd64",
        "config": {**CONFIG, **config},
        "rootfs": {"diff_ids": ["sha256:1", "sha256:2"]},
    }
    manifest = [{"Config": "config.json", "Layers": ["base.tar", "ours.tar"]}]
    path.write_bytes(
        packed(
            {
                "manifest.json": json.dumps(manifest).encode(),
                "config.json": json.dumps(document).encode(),
                "base.tar": packed(BASE),
                "ours.tar": packed(ours, owner),
            }
        )
    )
    return path


def failures(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The names of the checks that fail, except of that which asks PyPI."""
    report = Report()
    with archive.opened(path) as found:
        contents.check_configuration(found, report)
        contents.check_files(found, report)
    lines = [line.split(":")[0].split(None, 1) for line in capsys.readouterr().out.splitlines()]
    failed = [name for passed, name in lines if passed == "failed"]
    assert len(lines) == 11 and report.failed == len(failed)
    return failed


def test_an_image_that_keeps_its_promises_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failures(image(tmp_path / "image.tar", OURS), capsys) == []


@pytest.mark.parametrize(
    "config, failed",
    [
        ({"User": ""}, ["user"]),
        ({"Volumes": None}, ["volume"]),
        ({"Labels": None}, ["version", "source", "licenses"]),
        ({"Healthcheck": None}, ["health check"]),
    ],
)
def test_a_wrong_configuration_fails(
    config: dict[str, Any], failed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failures(image(tmp_path / "image.tar", OURS, **config), capsys) == failed


@pytest.mark.parametrize(
    "name, content, failed",
    [
        ("opt/large", bytes(65 << 20), "size"),
        ("usr/bin/gcc", b"", "build tools"),
        (f"{PIP}/setuptools/", b"", "build tools"),
        (f"{PACKAGES}/extra-1.0.dist-info/", b"", "distributions"),
        # A time, and a hash that is compared at run time.
        (BYTECODE, b"\xf3\r\r\n\0\0\0\0" + bytes(8), "bytecode"),
        (BYTECODE, b"\xf3\r\r\n\3\0\0\0" + bytes(8), "bytecode"),
        (LIBRARY, b"\x7fELF" + bytes(14) + b"\xb7\0", "architecture"),
    ],
)
def test_a_wrong_file_fails(
    name: str, content: bytes, failed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failures(image(tmp_path / "image.tar", {**OURS, name: content}), capsys) == [failed]


def test_pip_that_is_not_removed_from_the_base_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {name: content for name, content in OURS.items() if ".wh." not in name}
    assert failures(image(tmp_path / "image.tar", kept), capsys) == ["build tools"]


@pytest.mark.parametrize(
    "change, owner",
    [({}, 1), ({BYTECODE: b"other"}, 0), ({"opt/another": b""}, 0)],
    ids=["owner", "content", "name"],
)
def test_builds_that_differ_are_not_the_same(
    change: dict[str, bytes], owner: int, tmp_path: Path
) -> None:
    paths = [
        image(tmp_path / "one.tar", OURS),
        image(tmp_path / "same.tar", OURS),
        image(tmp_path / "other.tar", {**OURS, **change}, owner),
    ]
    with (
        archive.opened(paths[0]) as one,
        archive.opened(paths[1]) as same,
        archive.opened(paths[2]) as other,
    ):
        report = Report()
        contents.check_same(one, same, report)
        assert report.failed == 0
        contents.check_same(one, other, report)
        assert report.failed == 1

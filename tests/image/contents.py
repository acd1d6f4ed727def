"""The promises that the files and the configuration of an image show."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile

from packaging.utils import canonicalize_name

import xaiproxy

from .archive import Archive
from .report import Report

ROOT = pathlib.Path(__file__).parents[2]
REQUIREMENTS = ROOT / "conf" / "requirements.txt"
PACKAGES = re.compile(r"opt/xaiproxy/lib/python(3\.\d+)/site-packages")
SIZE_LIMIT = 64  # MiB
LABEL = "org.opencontainers.image."
TOOLS = re.compile(
    r".*/(site-packages|dist-packages|python3[.\d]*)/(pip|setuptools|wheel|pkg_resources|ensurepip)"
    r"|.*/bin/(pip[\d.]*|cc|gcc|g\+\+|c\+\+|clang|tcc|make|cmake|ld|as|cargo|rustc|go)"
)
# Architecture to its number in ELF files, and to its name in wheels.
MACHINES = {"amd64": (62, "x86_64"), "arm64": (183, "aarch64")}
# PEP 552: the bytecode has a hash of its source, which is not compared at run time.
UNCHECKED_HASH = (1).to_bytes(4, "little")


def check(archive: Archive, report: Report) -> None:
    check_configuration(archive, report)
    check_files(archive, report)
    check_wheels(archive, report)


def check_configuration(archive: Archive, report: Report) -> None:
    config = archive.config
    report.check("user", config["User"] == "10001:10001", config["User"] or "root")
    volumes = [*(config.get("Volumes") or {})]
    report.check("volume", volumes == ["/data"], ", ".join(volumes) or "none")
    check_labels(config.get("Labels") or {}, report)
    health = (config.get("Healthcheck") or {}).get("Test", [])
    report.check("health check", health[:1] == ["CMD"], " ".join(health) or "none")


def check_files(archive: Archive, report: Report) -> None:
    size = sum(entry.size for _, entry in archive.own_entries()) / 2**20
    report.check("size", size <= SIZE_LIMIT, f"{size:.1f} MiB above its base, of {SIZE_LIMIT}")
    tools = [path for path in archive.files if TOOLS.fullmatch("/" + path)]
    report.check("build tools", not tools, ", ".join(tools) or "none")
    check_distributions(archive, report)
    check_bytecode(archive, report)
    check_machine_code(archive, report)


def pinned() -> set[str]:
    """The lines NAME==VERSION of the image's requirements."""
    return set(re.findall(r"(?m)^([a-z0-9-]+==\S+)", REQUIREMENTS.read_text()))


def check_labels(labels: dict[str, str], report: Report) -> None:
    version = labels.get(LABEL + "version", "")
    report.check("version", version == xaiproxy.__version__, f"{version or 'none'} in its label")
    source = labels.get(LABEL + "source", "")
    shown = source or "none in its label; build it with --build-arg SOURCE=URL"
    report.check("source", source.startswith("https://"), shown)
    licenses = labels.get(LABEL + "licenses", "")
    report.check("licenses", licenses == "MIT", f"{licenses or 'none'} in its label")


def check_distributions(archive: Archive, report: Report) -> None:
    found = {
        f"{canonicalize_name(match[2])}=={match[3]}"
        for path in archive.files
        if (match := re.fullmatch(PACKAGES.pattern + r"/(.+)-(.+)\.dist-info", path))
    }
    needed = {f"xaiproxy=={xaiproxy.__version__}"} | {
        pin for pin in pinned() if not pin.startswith("setuptools==")
    }
    wrong = sorted(found ^ needed)
    shown = ", ".join(wrong) or f"{len(found)}, as {REQUIREMENTS.name} pins them"
    report.check("distributions", found == needed, shown)


def check_bytecode(archive: Archive, report: Report) -> None:
    paths = [
        entry.name
        for _, entry in archive.own_entries()
        if entry.name.endswith(".pyc") and entry.name in archive.files
    ]
    wrong = [path for path in paths if archive.read(path)[4:8] != UNCHECKED_HASH]
    shown = ", ".join(wrong[:3]) or f"{len(paths)} files, none with a time"
    report.check("bytecode", bool(paths) and not wrong, shown)


def check_machine_code(archive: Archive, report: Report) -> None:
    number, _ = MACHINES[archive.architecture]
    heads = {
        entry.name: archive.read(entry.name)[:20]
        for _, entry in archive.own_entries()
        if entry.isreg() and ".so" in pathlib.PurePath(entry.name).suffixes
    }
    wrong = [path for path, head in heads.items() if int.from_bytes(head[18:], "little") != number]
    shown = ", ".join(wrong) or f"{archive.architecture}, {len(heads)} libraries"
    report.check("architecture", bool(heads) and not wrong, shown)


def check_wheels(archive: Archive, report: Report) -> None:
    """pip finds a wheel of each requirement for each architecture; this needs PyPI."""
    [python] = {match[1] for path in archive.files if (match := PACKAGES.fullmatch(path))}
    for architecture, (_, machine) in MACHINES.items():
        platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(17, 37)]
        options = [f"--platform={name}" for name in [*platforms, f"manylinux2014_{machine}"]]
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                    *("--only-binary=:all:", "--require-hashes", f"--python-version={python}"),
                    *(*options, "--requirement", REQUIREMENTS, "--dest", folder),
                ],
                stderr=subprocess.PIPE,
                text=True,
            )
            found = len([*pathlib.Path(folder).iterdir()])
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        shown = " ".join(lines[-1:]) or f"{found} of {found}"
        report.check(f"wheels for {architecture}", done.returncode == 0, shown)


def check_same(archive: Archive, other: Archive, report: Report) -> None:
    ours, theirs = archive.own_contents(), other.own_contents()
    differing = sorted(
        path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)
    )
    alike = archive.own_digests == other.own_digests
    shown = f"{len(ours)} files, {'the same' if alike else 'other'} digests of the layers"
    if differing:
        shown = f"{len(differing)} of {len(ours)} files differ: {', '.join(differing[:5])}"
    report.check("reproducible", not differing, shown)

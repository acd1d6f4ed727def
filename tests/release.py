"""Make what a release consists of in dist/, from the last commit, and check it.

These are the source distribution, the wheel and the software bill of materials
of the image's Python packages (CycloneDX). The wheel is installed into an empty
environment, where the README's first session is run against a simulated xAI.
The packages come from PyPI. Each check prints a line that begins with ok or
failed. With IMAGE, bin/image-check follows.

Exit status: 0 all checks passed; 1 one failed; 64 wrong usage; 69 a program is
missing; 130 interrupted.
"""

from __future__ import annotations

import configparser
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from typing import Any

from packaging.utils import canonicalize_name

from xaiproxy import __version__, command, errors

from .image import contents
from .image.report import Report

ROOT = pathlib.Path(__file__).parents[1]
DIST = ROOT / "dist"
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXAMPLES = """\
  bin/release-check              make and check the files of a release
  bin/release-check image.tar    and the image, as bin/image-check does
"""
TOOLS = ["cyclonedx-bom>=7.5", "twine>=7"]
TIMEOUT = 60  # seconds


def run(*words: str | pathlib.Path, **options: Any) -> str:
    """What a command prints. Raises CalledProcessError, with what it printed to stderr."""
    done = subprocess.run(words, check=True, capture_output=True, text=True, **options)
    return done.stdout


def pip(python: pathlib.Path | str, *words: str | pathlib.Path) -> str:
    options = ["--python", python, "--disable-pip-version-check", "--quiet"]
    return run(sys.executable, "-m", "pip", *options, *words)


def check_versions(report: Report) -> None:
    changed = run("git", "status", "--porcelain", cwd=ROOT)
    report.check("checkout", not changed, changed.rstrip() or "all is committed")
    heading = re.findall(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())[0].strip("[]")
    report.check("changelog", heading == __version__, f"{heading} on top, for {__version__}")
    tags = run("git", "tag", "--points-at", "HEAD", "v*", cwd=ROOT).split()
    wrong = set(tags) - {f"v{__version__}"}
    report.check("tag", not wrong, ", ".join(tags) or "none of this commit yet")


def build(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Make the source distribution from the last commit, and the wheel from what that contains."""
    source = folder / "source"
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(source, filter="tar")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", DIST, cwd=source)
    [sdist] = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", DIST, unpacked)
    [wheel] = DIST.glob("*.whl")
    return sdist, wheel


def check_wheel(wheel: pathlib.Path, report: Report) -> None:
    # Links among them are to folders and files of conf/.
    tracked = run("git", "ls-files", "xaiproxy", cwd=ROOT).split()
    needed = set()
    for path in map(ROOT.joinpath, tracked):
        files = path.iterdir() if path.is_dir() else [path]
        needed |= {file.relative_to(ROOT).as_posix() for file in files if file.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licence = any(name.endswith("/LICENSE") for name in archive.namelist())
    package = {name for name in names if name.startswith("xaiproxy/")}
    others = {name for name in names - package if ".data/data/share/" not in name}
    wrong = sorted((package ^ needed) | others)
    report.check("wheel", not wrong and licence, ", ".join(wrong[:5]) or f"{len(names)} files")


def check_descriptions(tools: pathlib.Path, paths: list[pathlib.Path], report: Report) -> None:
    done = subprocess.run(
        [tools / "twine", "--no-color", "check", "--strict", *paths],
        capture_output=True,
        text=True,
    )
    shown = done.stdout + done.stderr if done.returncode else f"{len(paths)} descriptions"
    report.check("twine", done.returncode == 0, shown)


def environment(folder: pathlib.Path, *arguments: str | pathlib.Path) -> pathlib.Path:
    """The folder of commands of a new environment. `arguments`: of pip install."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip(folder / "bin" / "python", "install", "--only-binary=:all:", *arguments)
    return folder / "bin"


def installed(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The folder of commands of a new environment with the image's packages and the wheel."""
    scripts = environment(folder, "--require-hashes", "-r", contents.REQUIREMENTS)
    python = scripts / "python"
    pip(python, "install", "--no-deps", wheel)
    # The image is built with it, and does not have it.
    pip(python, "uninstall", "--yes", "setuptools")
    pip(python, "check")
    return scripts


def check_commands(scripts: pathlib.Path, report: Report) -> None:
    lines = SETUP["options.entry_points"]["console_scripts"].split("\n")
    names = [line.partition(" = ")[0] for line in lines if line]
    wrong = [name for name in names if run(scripts / name, "--version") != f"{__version__}\n"]
    shown = ", ".join(wrong) or f"{len(names)}, all of version {__version__}"
    report.check("commands", bool(names) and not wrong, shown)


@contextlib.contextmanager
def running(
    words: list[str], log: pathlib.Path, pattern: str, **options: Any
) -> Iterator[re.Match[str]]:
    """A program, once its output has `pattern`, until it is ended by SIGTERM."""
    with open(log, "wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, **options)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (match := re.search(pattern, log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{words[0]} does not start: {log.read_text()[-1000:]}")
            time.sleep(0.1)
        yield match
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def check_session(scripts: pathlib.Path, folder: pathlib.Path, report: Report) -> None:
    """Run the README's first block: to sign in, to serve, and requests."""
    [block, *_] = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    typed = re.findall(r"(?m)^\$ (.*)", block.replace("\\\n", ""))
    sign_in, serve, *requests = [line.partition(" #")[0].replace("bin/", "") for line in typed]
    home = folder / "home"
    home.mkdir()
    environ = {"PATH": f"{scripts}:{os.defpath}", "HOME": str(home), "XAI_PROXY_PORT": "0"}
    options: dict[str, Any] = {"cwd": home, "env": environ}
    sandbox = ["xai-sandbox", "--port", "0", "--auto-approve", "0", "--device-interval", "1"]
    with running(sandbox, folder / "sandbox.log", r"TOKEN_PATH=", **options):
        exported = (folder / "sandbox.log").read_text()
        for name in ("XAI_PROXY_ISSUER", "XAI_PROXY_UPSTREAM"):
            environ[name] = re.findall(rf"{name}=(\S+)", exported)[0]
        printed = run("sh", "-c", sign_in, **options)
        report.check("README", "Signed in as" in printed, sign_in)
        ready = r"ready: http://([\d.:]+)/v1"
        with running(serve.split(), folder / "serve.log", ready, **options) as match:
            for request in requests:
                output = run("sh", "-c", request.replace("127.0.0.1:9090", match[1]), **options)
                path = re.findall(r"(/v1/\S+)", request)[0]
                report.check(
                    "README", output.startswith(("{", "data: ")), f"{serve.strip()}, {path}"
                )
    left = sorted(path.name for path in home.iterdir())
    report.check("files", left == [".xai-proxy"], f"{', '.join(left)} in the home folder")


def check_materials(
    tools: pathlib.Path, scripts: pathlib.Path, folder: pathlib.Path, report: Report
) -> None:
    """Write the bill of materials of the image's Python packages."""
    project = folder / "pyproject.toml"
    needs = SETUP["options"]["install_requires"].split()
    project.write_text(
        f'[project]\nname = "xaiproxy"\nversion = "{__version__}"\n'
        f"dependencies = {json.dumps(needs)}\n"
    )
    bill = DIST / f"xaiproxy-{__version__}.cdx.json"
    run(
        *(tools / "cyclonedx-py", "environment", "--output-reproducible"),
        *("--pyproject", project, "--output-file", bill, scripts.parent),
    )
    document = json.loads(bill.read_text())
    found = {f"{canonicalize_name(c['name'])}=={c['version']}" for c in document["components"]}
    needed = {pin for pin in contents.pinned() if not pin.startswith("setuptools==")}
    root = document["metadata"]["component"]
    passed = found == needed and (root["name"], root["version"]) == ("xaiproxy", __version__)
    shown = ", ".join(sorted(found ^ needed)) or f"{len(found)} packages of {root['name']}"
    report.check("bill of materials", passed, shown)


def main() -> int:
    options = command.ArgumentParser(EXAMPLES, prog="bin/release-check", description=__doc__)
    options.add_argument("image", nargs="?", metavar="IMAGE", help="an archive or a name")
    arguments = options.parse_args()
    missing = [name for name in ("curl", "git") if not shutil.which(name)]
    if missing:
        options.exit(errors.EXIT_UNAVAILABLE, f"release-check: missing {' and '.join(missing)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = Report()
    shutil.rmtree(DIST, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix="release-check-") as name:
            folder = pathlib.Path(name)
            check_versions(report)
            sdist, wheel = build(folder)
            check_wheel(wheel, report)
            tools = environment(folder / "tools", *TOOLS)
            check_descriptions(tools, [sdist, wheel], report)
            scripts = installed(wheel, folder / "venv")
            check_commands(scripts, report)
            check_session(scripts, folder, report)
            check_materials(tools, scripts, folder, report)
        if arguments.image:
            done = subprocess.run([ROOT / "bin" / "image-check", arguments.image])
            report.check("image", done.returncode == 0, f"status {done.returncode}")
    except subprocess.CalledProcessError as error:
        report.check(str(error.cmd[0]), False, f"{error}: {error.stderr}")
    except KeyboardInterrupt:
        return errors.EXIT_INTERRUPTED
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Check what a built image has in it, and run the demo in its containers.

Each check prints a line that begins with ok or failed. The demo requires root,
containerd and runc; it uses a containerd of its own, a temporary folder and no
network. Whether there are wheels for each architecture is asked of PyPI.

Exit status: 0 all checks passed; 1 one failed; 64 wrong usage; 69 a program is
missing, so that nothing or not the demo was run; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

from xaiproxy import command, errors

from . import archive, contents, demo
from .containers import Containerd, missing
from .report import Report

EXAMPLES = """\
  bin/image-check image.tar    an archive of docker save or buildah push
  bin/image-check xaiproxy     an image of docker or podman; two minutes
  bin/image-check --same-as again.tar image.tar
"""


def parser() -> command.ArgumentParser:
    options = command.ArgumentParser(EXAMPLES, prog="bin/image-check", description=__doc__)
    options.add_argument(
        "image",
        nargs="?",
        default="xaiproxy",
        metavar="IMAGE",
        help="an archive or a name (default: %(default)s)",
    )
    options.add_argument(
        "--same-as", metavar="IMAGE", help="a second build, which must have the same files"
    )
    return options


def saved(image: str, folder: pathlib.Path) -> pathlib.Path:
    """The archive of an image, which is exported if `image` is not a file."""
    if pathlib.Path(image).is_file():
        return pathlib.Path(image)
    engine = shutil.which("docker") or shutil.which("podman")
    if engine is None:
        print(
            f"image-check: {image} is not a file, and neither docker nor podman is installed",
            file=sys.stderr,
        )
        raise SystemExit(errors.EXIT_UNAVAILABLE)
    path = folder / f"{len(list(folder.iterdir()))}.tar"
    if subprocess.run([engine, "save", "--output", path, image]).returncode:
        raise SystemExit(errors.EXIT_UNAVAILABLE)
    return path


def main() -> int:
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = Report()
    lacking = missing()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="image-check-") as name,
            contextlib.ExitStack() as stack,
        ):
            folder = pathlib.Path(name)
            path = saved(options.image, folder)
            image = stack.enter_context(archive.opened(path))
            contents.check(image, report)
            if options.same_as:
                other = stack.enter_context(archive.opened(saved(options.same_as, folder)))
                contents.check_same(image, other, report)
            if not lacking:
                containerd = stack.enter_context(Containerd(folder, path))
                try:
                    demo.check(containerd, image, folder, report)
                except AssertionError as error:
                    report.check("demo", False, error)
    except KeyboardInterrupt:
        print("image-check: interrupted", file=sys.stderr)
        return errors.EXIT_INTERRUPTED
    if lacking:
        print(f"image-check: the demo was not run: {lacking}", file=sys.stderr)
    if report.failed:
        return 1
    return errors.EXIT_UNAVAILABLE if lacking else 0


if __name__ == "__main__":
    sys.exit(main())

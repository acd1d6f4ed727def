"""Play the manifests of the sidecar and of the shared login in real pods.

The pods run in a real kubelet of Kubernetes 1.20, which has neither native
sidecars nor controllers: tests/kubernetes/manifest.py and shared_manifest.py
list what is changed for it. The volumes are real ones, and a simulated xAI is
the issuer. The login must survive each step, and a line is printed for each.

KUBE is a folder with three programs: `up DIR` starts an API server and prints
its address, `node DIR IMAGE` starts a kubelet, and `down DIR` ends both. IMAGE
is an archive of docker save or buildah push, with the name
localhost/xaiproxy:1.

Exit status: 0 nothing was lost; 1 something was; 64 wrong usage; 77 not root;
130 interrupted.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import tempfile

from xaiproxy import command, errors

from . import play

EXAMPLES = """\
  bin/kubernetes-check KUBE image.tar                  all; twenty minutes
  bin/kubernetes-check KUBE image.tar --only shared    steps by name
"""
NOT_ROOT = 77  # EX_NOPERM of sysexits.h


def parser() -> command.ArgumentParser:
    options = command.ArgumentParser(EXAMPLES, prog="bin/kubernetes-check", description=__doc__)
    options.add_argument("kube", type=pathlib.Path, metavar="KUBE")
    options.add_argument("image", type=pathlib.Path, metavar="IMAGE")
    options.add_argument("--only", default="", metavar="REGEX", help="the steps to play")
    return options


def main() -> int:
    options = parser().parse_args()
    if os.getuid():
        print("kubernetes-check: a kubelet needs root", file=sys.stderr)
        return NOT_ROOT
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lost = 0

    def report(step: str, survived: bool, seen: str) -> None:
        nonlocal lost
        lost += not survived
        print(f"{step:<40} {'ok' if survived else 'lost':<5} {seen}", flush=True)

    try:
        with tempfile.TemporaryDirectory(prefix="kubernetes-check-") as folder:
            play.play(options.kube, options.image, pathlib.Path(folder), options.only, report)
    except KeyboardInterrupt:
        print("kubernetes-check: interrupted", file=sys.stderr)
        return errors.EXIT_INTERRUPTED
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

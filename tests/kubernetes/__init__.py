"""The play: the manifests of conf/kubernetes in real pods. bin/kubernetes-check --help describes it."""

import pathlib
import sys

# The modules that tests share; pytest has this path from setup.cfg.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "support"))

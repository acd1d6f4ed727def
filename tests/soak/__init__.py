"""The soak: xaiproxy for long, while things go wrong. bin/soak --help says what is run and counted."""

import pathlib
import sys

# What the tests share; pytest has it from setup.cfg.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "support"))

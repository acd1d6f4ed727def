"""The soak: xaiproxy under faults and load for minutes. bin/soak --help describes the runs."""

import pathlib
import sys

# The modules that tests share; pytest has this path from setup.cfg.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "support"))

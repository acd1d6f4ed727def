"""The paths of the checkout under test."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
SUPPORT = pathlib.Path(__file__).parent
# The CA certificates of programs whose trust is not tested: a whole bundle takes each 40 ms.
ONE_CA = SUPPORT / "one_ca.pem"
# Of the programs that tests start. tests/test_without_linux.py sets the variable.
PRELUDE = f"{SUPPORT / 'without_linux'}{os.pathsep}" if os.environ.get("WITHOUT_LINUX") else ""
PYTHONPATH = f"{PRELUDE}{ROOT}"

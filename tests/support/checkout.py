"""Where the checkout is that is tested."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
SUPPORT = pathlib.Path(__file__).parent

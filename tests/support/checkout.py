"""The paths of the checkout under test."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
SUPPORT = pathlib.Path(__file__).parent

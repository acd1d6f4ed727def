"""Libraries of real clients, imported by the first test that uses one.

Their import takes seconds, and each worker collects all files.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest


class ClientLibrary:
    """A proxy for a module. If that is not installed, the test file is skipped."""

    def __init__(self, name: str):
        # Only the package is searched, since finding a submodule imports it.
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            pytest.skip(f"{name}, of the extra clients, is not installed", allow_module_level=True)
        self._name = name

    def __getattr__(self, name: str) -> Any:
        # pytest searches every module for fixtures.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)

"""Libraries of real clients, imported by the first test that uses one: that takes seconds, and each worker collects all files."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest


class ClientLibrary:
    """Stands for the module of that name. Skips the test file that makes one when it is not installed."""

    def __init__(self, name: str):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name}, of the extra clients, is not installed", allow_module_level=True)
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by pytest, which searches every module for fixtures
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)

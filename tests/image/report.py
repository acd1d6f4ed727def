"""The lines of a run."""

from __future__ import annotations


class Report:
    def __init__(self) -> None:
        self.failed = 0

    def check(self, name: str, passed: bool, figure: object) -> None:
        self.failed += not passed
        print(f"{'ok' if passed else 'failed':8} {name}: {figure}", flush=True)

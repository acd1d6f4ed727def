"""A limit on memory that requests share."""

from __future__ import annotations


class MemoryBudget:
    """The number of bytes that all requests together may keep."""

    def __init__(self, limit: int):
        self.limit = limit
        self.used = 0

    def take(self, size: int) -> bool:
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        self.used -= size

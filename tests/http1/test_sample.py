"""Content that is kept while it passes."""

from __future__ import annotations

import pytest

from xaiproxy.http1.memory_budget import MemoryBudget
from xaiproxy.http1.sample import END, LIMIT, START, WHOLE_LIMIT, Sample

SEPARATOR = b"\n\n"


def content(size: int) -> bytes:
    return b"".join(b"%07d\n" % number for number in range(size // 8 + 1))[:size]


@pytest.mark.parametrize("size", [0, 1, START, END, START + END, LIMIT])
@pytest.mark.parametrize("part", [1000, 100_000])
def test_short_content_is_kept_as_it_is(size: int, part: int) -> None:
    data, sample = content(size), Sample()
    for start in range(0, size, part):
        sample.add(data[start : start + part])
    assert sample.is_whole
    assert sample.end(100) == data[-100:]
    assert sample.take() == data


@pytest.mark.parametrize("size", [LIMIT + 1, 100_000, 1_000_000])
@pytest.mark.parametrize("part", [1000, 50_000, 1_000_000])
def test_start_and_end_of_long_content_are_kept(size: int, part: int) -> None:
    data, sample = content(size), Sample()
    for start in range(0, size, part):
        sample.add(data[start : start + part])
    assert not sample.is_whole
    assert sample.end(END) == data[-END:]
    taken = sample.take()
    begin, end = taken[: START + 2], taken[START + 2 :]
    assert begin == data[:START] + SEPARATOR
    assert data.endswith(end) and END <= len(end) <= LIMIT


def test_taken_content_is_freed() -> None:
    budget = MemoryBudget(100)
    sample = Sample(budget)
    sample.add(b"x" * 60)
    assert budget.used == 60
    assert sample.take() == b"x" * 60
    assert (sample.take(), sample.end(10), budget.used) == (b"", b"", 0)


def test_whole_content_is_kept_up_to_the_limit() -> None:
    budget = MemoryBudget(10 * WHOLE_LIMIT)
    sample = Sample(budget)
    sample.add(bytes(WHOLE_LIMIT))
    assert not sample.too_long and budget.used == WHOLE_LIMIT
    sample.add(b"x")
    assert sample.too_long and budget.used == 0
    sample.add(b"x")
    assert budget.used == 0 and sample.take() == b""


@pytest.mark.parametrize("part", [100, 1000, 8192, 50_000])
def test_what_is_kept_of_long_content_is_limited(part: int) -> None:
    sample = Sample()
    for _ in range(200_000 // part):
        sample.add(bytes(part))
        kept = len(sample.end(1 << 20)) + (0 if sample.is_whole else START)
        assert kept <= LIMIT


def test_one_write_above_the_limit_is_too_long() -> None:
    budget = MemoryBudget(10 * WHOLE_LIMIT)
    sample = Sample(budget)
    sample.add(bytes(2 * WHOLE_LIMIT))
    assert sample.too_long and budget.used == 0


def test_content_beyond_the_budget_is_dropped() -> None:
    budget = MemoryBudget(100)
    first, second = Sample(budget), Sample(budget)
    first.add(bytes(90))
    second.add(bytes(10))
    second.add(bytes(1))
    assert second.too_long and budget.used == 90
    assert len(first.take()) == 90 and budget.used == 0

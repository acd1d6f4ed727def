"""tests/simulated_pods.py: docs/scaling.md has its results, and it counts what it should."""

from __future__ import annotations

import random

from checkout import ROOT

from tests import simulated_pods
from tests.simulated_pods import PODS, RETRY_AFTER, Mounting, outage, refusal, rotation

AT_ONCE, LATE = Mounting("at once", 0, 0), Mounting("late", 100, 100)


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_page_has_the_tables_and_the_picture() -> None:
    page = words((ROOT / "docs/scaling.md").read_text())
    for part in (simulated_pods.inputs, simulated_pods.rotations, simulated_pods.refusals):
        assert words(part()) in page
    assert (ROOT / "docs/scaling.svg").read_text() == simulated_pods.drawing()


def test_a_token_that_is_mounted_in_time_costs_nothing() -> None:
    assert rotation(21600, LATE)(random.Random(1)).refused == 0


def test_a_token_that_is_mounted_after_the_expiry_costs_the_time_between() -> None:
    found = rotation(120, LATE)(random.Random(1))
    # Renewed 60 s before its end, and published a second later.
    assert found.longest == 41
    assert 0.9 < found.refused / (PODS * 41 / simulated_pods.INTERVAL) < 1.1


def test_a_refusal_costs_the_time_until_the_mount() -> None:
    assert 1 < refusal(AT_ONCE)(random.Random(1)).longest < 2
    assert 101 < refusal(LATE)(random.Random(1)).longest < 102
    assert refusal(AT_ONCE, held=60)(random.Random(1)).longest == 61


def test_a_retry_saves_what_it_sends_after_the_mount() -> None:
    ends = [2 * RETRY_AFTER - 1] * PODS
    found = outage(random.Random(1), ends)
    assert found.lost == {2: 0, 3: 0} and found.refused
    found = outage(random.Random(1), [each + 2 for each in ends])
    assert 0 < found.lost[2] < found.refused / 10 and found.lost[3] == 0

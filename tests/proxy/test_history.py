"""What the status page shows of the last hour and the day."""

import json
import time

import pytest

from xaiproxy import errors
from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.proxy.history import History
from xaiproxy.proxy.pace import Pace
from xaiproxy.proxy.usage import Usage

NOON = time.mktime((2026, 7, 1, 12, 0, 0, 0, 0, -1))
RECORD = RequestRecord(
    "POST",
    "/v1/chat/completions",
    NOON,
    200,
    10,
    20,
    0.1,
    0.5,
    0.001,
    "done",
    None,
    "127.0.0.1",
    "",
    "id",
    None,
    None,
    None,
    "",
    None,
)


def test_there_are_sixty_minutes_and_the_last_is_the_present_one():
    minutes = History().minutes(NOON + 30)
    assert [minute["at"] for minute in minutes] == [NOON - 60 * back for back in range(59, -1, -1)]
    assert minutes[-1] == {
        "at": NOON,
        "requests": 0,
        "errors": 0,
        "first_byte_p50": None,
        "first_byte_p95": None,
    }


def test_a_request_counts_in_the_minute_in_which_it_ended():
    history = History()
    history.add(RECORD._replace(started_at=NOON - 100, duration=110))
    assert [minute["requests"] for minute in history.minutes(NOON)][-3:] == [0, 0, 1]


def test_an_error_is_a_5xx_or_a_broken_response():
    history = History()
    for record in (
        RECORD,
        RECORD._replace(status=404),
        RECORD._replace(status=500),
        RECORD._replace(broken=errors.UpstreamBroken("reset")),
    ):
        history.add(record)
    minute = history.minutes(NOON)[-1]
    assert (minute["requests"], minute["errors"]) == (4, 2)


def test_percentiles_of_the_first_byte_are_exact_to_five_percent():
    history = History()
    for number in range(1, 101):
        history.add(RECORD._replace(first_byte=number / 100))
    history.add(RECORD._replace(first_byte=None))
    minute = history.minutes(NOON)[-1]
    assert minute["first_byte_p50"] == pytest.approx(0.5, rel=0.06)
    assert minute["first_byte_p95"] == pytest.approx(0.95, rel=0.06)


def test_a_first_byte_of_no_measurable_time_counts():
    history = History()
    history.add(RECORD._replace(first_byte=0.0))
    assert history.minutes(NOON)[-1]["first_byte_p50"] == pytest.approx(1e-6, rel=0.06)


def test_minutes_are_dropped_after_an_hour_and_after_the_clock_was_set_back():
    history = History()
    for minutes in (0, 59, 60, 100_000):
        history.add(RECORD._replace(started_at=NOON + 60 * minutes))
    assert len(history._minutes) == 1
    history.add(RECORD)
    assert len(history._minutes) == 1
    assert history.minutes(NOON)[-1]["requests"] == 1


def test_tokens_are_summed_by_model_and_key_until_midnight():
    history = History()
    history.add_usage(NOON, "grok-4.5", "alice", Usage("grok-4.5", 10, 4, 5, 1))
    history.add_usage(NOON, "grok-4.5", "alice", Usage("grok-4.5", 1, 0, 1, 0))
    history.add_usage(NOON, "grok-4.5", "", Usage("grok-4.5", 100, 0, 1, 0))
    assert history.tokens_today(NOON) == [
        {
            "model": "grok-4.5",
            "key": "",
            "input": 100,
            "cached_input": 0,
            "output": 1,
            "reasoning": 0,
        },
        {
            "model": "grok-4.5",
            "key": "alice",
            "input": 11,
            "cached_input": 4,
            "output": 6,
            "reasoning": 1,
        },
    ]
    tomorrow = NOON + 13 * 3600
    assert history.tokens_today(tomorrow) == []
    history.add_usage(tomorrow, "grok-4.5", "", Usage("grok-4.5", 1, 0, 2, 0))
    assert [row["output"] for row in history.tokens_today(tomorrow)] == [2]


def test_of_many_models_and_keys_the_largest_have_rows_of_their_own():
    """The page gets them every two seconds, and a row takes 3 us."""
    history = History()
    for number in range(150):
        history.add_usage(NOON, f"m-{number}", "alice", Usage("", number, 1, 2, 0))
    rows = history.tokens_today(NOON)
    assert [row["model"] for row in rows] == [f"m-{149 - place}" for place in range(100)] + [
        "other"
    ]
    assert rows[-1] == {
        "model": "other",
        "key": "other",
        "input": sum(range(50)),
        "cached_input": 50,
        "output": 100,
        "reasoning": 0,
    }


def test_the_last_rate_limits_are_kept_with_their_time():
    history = History()
    assert history.rate_limits() == {}
    history.set_rate_limit(NOON, "tokens", 50_000_000, 49_000_000)
    history.set_rate_limit(NOON + 1, "tokens", 50_000_000, 48_000_000)
    history.set_rate_limit(NOON, "requests", 7200, 7199)
    assert history.rate_limits() == {
        "tokens": {"limit": 50_000_000, "remaining": 48_000_000, "at": NOON + 1},
        "requests": {"limit": 7200, "remaining": 7199, "at": NOON},
    }


def test_a_worker_whose_clock_was_ahead_does_not_hide_the_others():
    """Its day has not begun yet, nor its rate limits been sent."""
    tomorrow = NOON + 24 * 3600
    ahead, right = History(), History()
    for history, at, number in ((ahead, tomorrow, 1), (right, NOON, 2)):
        history.add_usage(at, "grok-4.5", "alice", Usage("grok-4.5", number, 0, 0, 0))
        history.set_rate_limit(at, "tokens", 50_000_000, number)
    for order in ((ahead, right), (right, ahead)):
        total = History()
        for history in order:
            total.add_plain(json.loads(json.dumps(history.plain())), Pace(), lambda: NOON)
        assert [row["input"] for row in total.tokens_today(NOON)] == [2]
        assert total.rate_limits()["tokens"]["remaining"] == 2
    alone = History()
    alone.add_plain(ahead.plain(), Pace(), lambda: NOON)
    assert alone.rate_limits()["tokens"]["remaining"] == 1

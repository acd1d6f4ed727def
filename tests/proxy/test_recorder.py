"""Records are counted, and the page is rendered, in slices between which other greenlets run."""

from __future__ import annotations

import gc
import gzip
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import gevent.socket
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from proxy_process import ISSUER
from used_tokens import CHAT

from xaiproxy import client_keys, config, errors
from xaiproxy.http1 import response_head
from xaiproxy.http1.pool import Pool
from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.proxy import access, app, counters, forward, recorder, usage
from xaiproxy.proxy.loop_lag import LoopLag
from xaiproxy.proxy.metrics import Metrics
from xaiproxy.proxy.numbers import OwnNumbers
from xaiproxy.proxy.pace import Pace
from xaiproxy.proxy.recorder import Recorder
from xaiproxy.proxy.server import Server
from xaiproxy.proxy.trouble import Trouble
from xaiproxy.token_store import TokenStore

LIMIT = 0.002  # seconds of CPU time for which nothing may hold the event loop
OPENMETRICS = "application/openmetrics-text"


def record(content: bytes = b"", coding: str = "", **changes: object) -> RequestRecord:
    values = {"content-type": ["application/json"]}
    if coding:
        values["content-encoding"] = [coding]
    head = response_head.Head(200, "OK", "", values)
    sample = usage.sample_for("chat", head)
    assert sample is not None
    sample.add(content)
    whole = RequestRecord(
        "POST",
        "/v1/chat/completions",
        time.time(),
        200,
        10,
        len(content),
        0.1,
        0.2,
        0.001,
        "done",
        None,
        "127.0.0.1",
        "",
        "id",
        head,
        None,
        None,
        "",
        sample,
    )
    return whole._replace(**changes)


@pytest.fixture
def scrape(tmp_path: Path) -> Iterator[tuple[Metrics, Recorder]]:
    settings = config.from_environ(
        {
            "XAI_PROXY_TOKEN_PATH": str(tmp_path / "tokens.json"),
            "XAI_PROXY_UPSTREAM": ISSUER,
            "XAI_PROXY_ISSUER": ISSUER,
        },
        dotenv_path=os.devnull,
    )
    pool, store, lag = Pool(settings), TokenStore(settings), LoopLag()
    gate = access.Access(settings, client_keys.ClientKeys(settings.client_keys_file))
    proxy = forward.Proxy(settings, store, gate, pool)
    counting = Recorder()
    trouble = Trouble(counting.upstream)
    own = OwnNumbers(counting, pool, lag, trouble)
    metrics = Metrics(own, store)
    with gevent.socket.socket() as listener:
        application = app.create_app(proxy, store, gate, metrics=metrics.page)
        own.server = trouble.server = Server(
            listener, application, proxy, settings, 10, counting.add
        )
        yield metrics, counting
    lag.close()


def longest_hold(work: Callable[[], object]) -> tuple[float, int]:
    """The most CPU time that passes between two turns of another greenlet, and the turns.

    CPU time, since another process may have the core at any moment.
    """
    holds: list[float] = []

    def tick() -> None:
        while True:
            before = time.thread_time()
            gevent.sleep(0)
            holds.append(time.thread_time() - before)

    # The collector may run at any moment, and its duration is that of the test's own objects.
    gc.collect()
    gc.disable()
    ticking = gevent.spawn(tick)
    try:
        gevent.sleep(0.01)
        holds.clear()
        work()
        gevent.sleep(0.01)
    finally:
        gc.enable()
        ticking.kill()
    return max(holds), len(holds)


def held_less_than_the_limit(work: Callable[[], object]) -> bool:
    """Whether at most LIMIT: once in three tries, since caches are cold, and CPUs slow down."""
    return any(longest_hold(work)[0] < LIMIT for _ in range(3))


def test_a_record_is_counted_a_moment_later() -> None:
    counting = Recorder()
    for _ in range(3):
        counting.add(record(CHAT))
    assert not counting.counters.tokens
    gevent.sleep(recorder.DELAY * 3)
    assert counting.counters.tokens["grok-4.5", ""] == [1506, 1152, 42, 39]
    counting.add(record(CHAT, key="alice"))
    gevent.sleep(recorder.DELAY * 3)
    assert counting.counters.tokens["grok-4.5", "alice"] == [502, 384, 14, 13]


def test_metrics_and_history_are_counted_together() -> None:
    counting, now = Recorder(), time.time()
    counting.add(record(CHAT, key="alice"))
    counting.add(record(status=502, refusal=errors.UpstreamTimeout("late"), upstream=None))
    counting.add(record(path="/metrics", upstream=None, sample=None))
    counting.fold()
    minutes = counting.history.minutes(now + 1)
    assert sum(minute["requests"] for minute in minutes) == 2
    assert sum(minute["errors"] for minute in minutes) == 1
    assert [row["input"] for row in counting.history.tokens_today(now)] == [502]
    requests = counting.counters.routes["chat"].requests
    assert dict(requests) == {(200, "alice"): 1, (502, ""): 1}
    assert dict(counting.counters.routes["own"].requests) == {(200, ""): 1}
    assert counting.counters.upstream_errors["timeout"] == 1


def test_a_successor_has_room_for_as_many_keys() -> None:
    """Requests without a key, and those of further keys, take none of it."""
    former = Recorder()
    for key in (None, counters.OTHER, *map(str, range(counters.KEYS)), "further"):
        former.add(record(key=key))
    former.fold()
    successor = Recorder()
    plain = json.loads(json.dumps([former.counters.plain(), former.history.plain()]))
    successor.add_former(*plain)
    last = str(counters.KEYS - 1)
    for key in (last, "further"):
        successor.add(record(key=key))
    successor.fold()
    requests = successor.counters.routes["chat"].requests
    assert (requests[200, last], requests[200, counters.OTHER]) == (2, 3)


def test_the_sum_of_workers_has_no_more_names_than_one() -> None:
    """Whichever of them adds it up. The further names are counted as one."""
    workers = [counters.Counters() for _ in range(2)]
    for number, one in enumerate(workers):
        for name in range(number * 60, number * 60 + counters.KEYS):
            one.routes["chat"].requests[200, f"{name:03}"] += 1
            one.add_usage(f"m-{name % 80:03}", f"{name:03}", usage.Usage("", 1, 0, 1, 0))
    workers[0].routes["chat"].requests[200, ""] += 1
    sums = []
    for order in (workers, workers[::-1]):
        total = counters.Counters()
        for one in order:
            total.add_plain(one.plain(), Pace())
        total.limit_names(Pace())
        sums.append(total)
    assert sums[0].routes["chat"].requests == sums[1].routes["chat"].requests
    assert sums[0].tokens == sums[1].tokens
    keys = {key for _, key in sums[0].routes["chat"].requests}
    assert keys == {"", counters.OTHER, *(f"{name:03}" for name in range(counters.KEYS))}
    assert {key for _, key in sums[0].tokens} == keys - {""}
    assert len({model for model, _ in sums[0].tokens}) == counters.MODELS + 1
    assert sum(sums[0].routes["chat"].requests.values()) == 2 * counters.KEYS + 1
    assert sum(one[0] for one in sums[0].tokens.values()) == 2 * counters.KEYS


def test_a_request_in_the_drain() -> None:
    counting = Recorder()
    counting.add(record(ended_by="drain"))
    counting.fold()
    assert counting.counters.routes["chat"].ended["drain"] == 1
    assert counting.counters.unread["cut"] == 1


def test_an_unexpected_error_of_the_proxy() -> None:
    counting = Recorder()
    refusal = errors.ErrorResponse("the proxy failed")
    counting.add(record(status=500, refusal=refusal, upstream=None, sample=None, ended_by="proxy"))
    counting.fold()
    assert counting.counters.rejected["internal_error"] == 1


def test_all_memory_of_samples_is_given_back() -> None:
    counting = Recorder()
    for changes in ({}, {"method": "GET"}, {"path": "/v1/messages/count_tokens"}):
        for _ in range(70):
            counting.add(record(bytes(1_000_000), **changes))
        counting.fold()
    assert usage._budget.used == 0
    # Each time the budget was exceeded by some.
    assert counting.counters.unread["none"] == usage.MEMORY // 1_000_000


def test_counting_lets_other_greenlets_run() -> None:
    """1,000 records, large and small, plain and compressed, one of which is a bomb."""
    noise = random.Random(1).randbytes(300_000).hex().encode()
    large = b'{"text":"%b",' % noise + CHAT[1:]
    packed, bomb = gzip.compress(large), gzip.compress(bytes(40 << 20))
    prepared = []
    for _ in range(3):
        records = [record(CHAT, key=str(number % 150)) for number in range(1000)]
        records += [record(large), record(packed, "gzip"), record(bomb, "gzip")]
        prepared.append([*records, record(bytes(1 << 20))])

    def work() -> None:
        counting = Recorder()
        for one in prepared.pop():
            counting.add(one)
        counting.fold()
        assert counting.counters.unread == {"too_long": 1, "none": 1}

    assert held_less_than_the_limit(work)


def test_a_scrape_of_many_series_lets_other_greenlets_run(
    scrape: tuple[Metrics, Recorder],
) -> None:
    metrics, counting = scrape
    for number in range(100):
        for status in (200, 400, 429, 500):
            counting.add(record(key=f"key-{number}", status=status))
        for model in range(10):
            content = CHAT.replace(b"grok-4.5", b"model-%d" % model)
            counting.add(record(content, key=f"key-{number}"))
    counting.fold()
    text = metrics.page(OPENMETRICS)[0].decode()
    families = list(text_string_to_metric_families(text))
    assert sum(len(family.samples) for family in families) > 4000
    assert held_less_than_the_limit(lambda: metrics.page(OPENMETRICS))
    assert held_less_than_the_limit(lambda: metrics.page(""))


def test_scrapes_at_the_same_time_hold_no_longer(
    scrape: tuple[Metrics, Recorder],
) -> None:
    metrics, counting = scrape
    for number in range(100):
        for status in (200, 400, 429, 500):
            counting.add(record(key=f"key-{number}", status=status))
    counting.fold()

    def work() -> None:
        scrapes = [gevent.spawn(metrics.page, "") for _ in range(4)]
        assert {scrape.get()[0].count(b'key="key-7"') for scrape in scrapes} == {4}

    assert held_less_than_the_limit(work)

"""Metric families whose samples prometheus_client gets one by one while it renders them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from xaiproxy.proxy.counters import Histogram

# The label values and the value of each sample.
Rows = Iterable[tuple[Any, ...]]


def gauge(name: str, documentation: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    return _family("gauge", name, documentation, _samples(name, labels, rows))


def counter(name: str, documentation: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    """`name`: without the suffix _total of its samples."""
    return _family("counter", name, documentation, _samples(f"{name}_total", labels, rows))


def info(name: str, documentation: str, labels: Mapping[str, str]) -> Metric:
    """`name`: without the suffix _info of its sample."""
    return _family("info", name, documentation, [Sample(f"{name}_info", dict(labels), 1)])


def histogram(
    name: str, documentation: str, histograms: Iterable[tuple[dict[str, str], Histogram]]
) -> Metric:
    """`histograms`: each with its labels."""
    return _family("histogram", name, documentation, _buckets(name, histograms))


def from_zero(values: Iterable[str], counted: Mapping[str, int]) -> Rows:
    """Rows of all that is counted, also of those `values` that are not: with 0.

    To rate() the first increase is one only if the value was there before.
    """
    return {**dict.fromkeys(values, 0), **counted}.items()


def known(value: float | None) -> Rows:
    """One row, or none if the value is None."""
    return [] if value is None else [(value,)]


def _family(type: str, name: str, documentation: str, samples: Iterable[Sample]) -> Metric:
    family = Metric(name, documentation, type)
    # It is declared as a list, and only iterated.
    family.samples = samples  # type: ignore[assignment]
    return family


def _samples(name: str, labels: tuple[str, ...], rows: Rows) -> Iterator[Sample]:
    for *values, value in rows:
        yield Sample(
            name, {label: str(text) for label, text in zip(labels, values, strict=True)}, value
        )


def _buckets(name: str, histograms: Iterable[tuple[dict[str, str], Histogram]]) -> Iterator[Sample]:
    for labels, histogram in histograms:
        # Both at once: requests are counted between two samples.
        counts, total = tuple(histogram.counts), histogram.sum
        number = 0
        for bound, count in zip((*map(repr, histogram.bounds), "+Inf"), counts, strict=True):
            number += count
            yield Sample(f"{name}_bucket", {**labels, "le": bound}, number)
        yield Sample(f"{name}_count", labels, number)
        yield Sample(f"{name}_sum", labels, total)

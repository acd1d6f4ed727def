"""Metric families whose samples prometheus_client gets one by one while it renders them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

# The label values and the value of each sample.
Rows = Iterable[tuple[Any, ...]]
OPENMETRICS = "application/openmetrics-text"


def encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """Return what renders /metrics for an Accept header, and its media type."""
    # choose_encoder gets no text of the client's: it raises for a version that is not a number.
    wanted = any(part.split(";")[0].strip() == OPENMETRICS for part in accept.split(","))
    return choose_encoder(OPENMETRICS if wanted else "")


def gauge(name: str, documentation: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    return family("gauge", name, documentation, _samples(name, labels, rows))


def counter(name: str, documentation: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    """`name`: without the suffix _total of its samples."""
    return family("counter", name, documentation, _samples(f"{name}_total", labels, rows))


def info(name: str, documentation: str, labels: Mapping[str, str]) -> Metric:
    """`name`: without the suffix _info of its sample."""
    return family("info", name, documentation, [Sample(f"{name}_info", dict(labels), 1)])


def from_zero(values: Iterable[str], counted: Mapping[str, int]) -> Rows:
    """Rows of all that is counted, also of those `values` that are not: with 0.

    To rate() the first increase is one only if the value was there before.
    """
    return {**dict.fromkeys(values, 0), **counted}.items()


def known(value: float | None) -> Rows:
    """One row, or none if the value is None."""
    return [] if value is None else [(value,)]


def family(type: str, name: str, documentation: str, samples: Iterable[Sample]) -> Metric:
    family = Metric(name, documentation, type)
    # It is declared as a list, and only iterated.
    family.samples = samples  # type: ignore[assignment]
    return family


def _samples(name: str, labels: tuple[str, ...], rows: Rows) -> Iterator[Sample]:
    for *values, value in rows:
        yield Sample(
            name, {label: str(text) for label, text in zip(labels, values, strict=True)}, value
        )

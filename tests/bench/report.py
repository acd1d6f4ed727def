"""From records to a table: medians, and ratios of the same round with their spread."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from .measurements import FLATNESS, HELD, LITELLM, RUNS, Figure

ORDER = ("direct", "nginx", "go", "rust", "xaiproxy", "other", "rotating", "litellm")
# Share of the time that other processes may take of both cores before a run counts as disturbed.
UNDISTURBED = 0.1
# Share of core 0's time from which on its proxy was the limit.
SATURATED = 0.85


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])


class Records:
    """What was measured: a dict a run, with `tls`, `run`, `round`, `target`, `figures` and either
    `busy` and `disturbed` or `wrong`.
    """

    def __init__(self, records: list[dict[str, Any]]):
        self.records = records

    def values(self, figure: str, target: str, tls: bool) -> dict[int, float]:
        """Round to value."""
        return {
            record["round"]: record["figures"][figure]
            for record in self.records
            if record["target"] == target and record["tls"] == tls and figure in record["figures"]
        }

    def spread(self, figure: str, target: str, tls: bool) -> Spread | None:
        values = self.values(figure, target, tls)
        return Spread.of(values.values()) if values else None

    def ratio(self, figure: str, target: str, against: str, tls: bool) -> Spread | None:
        """Of the rounds that both have."""
        ours, theirs = self.values(figure, target, tls), self.values(figure, against, tls)
        ratios = [ours[round] / theirs[round] for round in ours if theirs.get(round)]
        return Spread.of(ratios) if ratios else None

    def busy(self, figure: str, target: str, tls: bool) -> float | None:
        """The share of core 0 that the target used, while the figure was measured."""
        shares = [
            record["busy"]
            for record in self.records
            if record["target"] == target and record["tls"] == tls and figure in record["figures"]
        ]
        return statistics.median(shares) if shares else None

    def targets(self, tls: bool) -> list[str]:
        here = {
            record["target"]
            for record in self.records
            if record["tls"] == tls and record["figures"]
        }
        return [name for name in ORDER if name in here]

    def faults(self) -> list[str]:
        """What went wrong or was disturbed, a line each."""
        lines = [
            f"{where(record)}: {record['wrong']}" for record in self.records if record.get("wrong")
        ]
        disturbed = [
            where(record) for record in self.records if record.get("disturbed", 0) > UNDISTURBED
        ]
        if disturbed:
            some = ", ".join(disturbed[:4]) + (", …" if disturbed[4:] else "")
            lines.append(
                f"other processes took more than {UNDISTURBED:.0%} of a core during "
                f"{len(disturbed)} of {len(self.records)} runs: {some}"
            )
        for run in filter(lambda run: run.saturates, RUNS):
            for tls, target in sorted(
                {(record["tls"], record["target"]) for record in self.records}
            ):
                busy = self.busy(run.figures[0].name, target, tls)
                if target != "direct" and busy is not None and busy < SATURATED:
                    lines.append(
                        f"{'TLS' if tls else 'plain'} {run.name}: {target} used only {busy:.0%} of "
                        "core 0, so something else was the limit"
                    )
        return lines


def where(record: dict[str, Any]) -> str:
    return f"{'TLS' if record['tls'] else 'plain'} {record['run']} {record['target']} round {record['round']}"


def figures() -> Iterator[Figure]:
    for run in (*RUNS, *HELD, *LITELLM, *FLATNESS):
        yield from run.figures


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(records: Records, tls: bool) -> list[str]:
    """Markdown: a line a figure.

    The last column is the share of core 0 that nginx and xaiproxy used.
    """
    targets = records.targets(tls)
    beside = [name for name in ("nginx", "other") if name in targets and "xaiproxy" in targets]
    heads = ["", *targets, *(f"xaiproxy : {name}" for name in beside), "goal", "", "core 0 busy"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for figure in figures():
        spreads = [records.spread(figure.name, target, tls) for target in targets]
        if not any(spreads):
            continue
        cells = [figure.title, *(number(spread.median) if spread else "" for spread in spreads)]
        for name in beside:
            ratio = records.ratio(figure.name, "xaiproxy", name, tls)
            cells.append(f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else "")
        cells += judged(records, figure, tls)
        busy = [records.busy(figure.name, name, tls) for name in ("nginx", "xaiproxy")]
        cells.append(" / ".join("–" if share is None else f"{share:.0%}" for share in busy))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def judged(records: Records, figure: Figure, tls: bool) -> list[str]:
    """The goal, and whether xaiproxy meets it: by the median."""
    goal = figure.goal
    if goal is None:
        return ["", ""]
    subject = "rotating" if figure.name.startswith("rotation") else "xaiproxy"
    found = (
        records.ratio(figure.name, subject, goal.against, tls)
        if goal.against
        else records.spread(figure.name, subject, tls)
    )
    if found is None:
        return [str(goal), "not measured"]
    shown = f" ({found.median:.3g})" if goal.against not in ("", "nginx") else ""
    return [str(goal), ("met" if goal.met(found.median) else "**missed**") + shown]


def markdown(bench: dict[str, Any]) -> str:
    """The whole report of a bench.json."""
    records = Records(bench["records"])
    machine = bench["machine"]
    lines = [", ".join(f"{name} {value}" for name, value in machine.items())]
    for tls in (True, False):
        if records.targets(tls):
            lines += [
                "",
                f"Upstream {'over TLS' if tls else 'in the clear'}:",
                "",
                *table(records, tls),
            ]
    if "help_cpu" in bench:
        seconds = bench["help_cpu"]
        verdict = "met" if seconds <= 0.2 else "**missed**"
        lines += ["", f"`xai-login --help`: {seconds:.2f} s of CPU (goal ≤ 0.2: {verdict})"]
    if bench.get("age"):
        lines += [
            "",
            "Age at load: "
            + "; ".join(
                f"{slot['age']:.0f} s: {number(slot['pss'])} KiB, {slot['cpu_request']:.1f} µs a request"
                for slot in (bench["age"][0], bench["age"][-1])
            ),
        ]
    if records.faults():
        lines += ["", *(f"- {fault}" for fault in records.faults())]
    return "\n".join(lines) + "\n"

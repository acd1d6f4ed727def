"""python -m tests.bench.plot BENCH_JSON FOLDER: bench.svg and bench.png. Needs matplotlib."""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from . import measurements, report

COLOURS = {"nginx": "tab:green", "xaiproxy": "tab:blue", "other": "tab:orange"}


def ratios(axes: Any, records: report.Records, tls: bool) -> None:
    """Each figure that has a goal beside nginx, with its spread, and the goal as a tick."""
    figures = [
        figure
        for figure in report.figures()
        if figure.goal
        and figure.goal.against == "nginx"
        and records.ratio(figure.name, "xaiproxy", "nginx", tls)
    ]
    for row, figure in enumerate(reversed(figures)):
        assert figure.goal is not None
        for shift, name in ((0.12, "xaiproxy"), (-0.12, "other")):
            ratio = records.ratio(figure.name, name, "nginx", tls)
            if ratio:
                spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
                axes.errorbar(
                    ratio.median,
                    row + shift,
                    xerr=spread,
                    fmt="o",
                    color=COLOURS[name],
                    label=name if row == 0 else None,
                )
        axes.plot(
            [figure.goal.limit],
            [row],
            "|",
            color="black",
            markersize=18,
            label="goal" if row == 0 else None,
        )
    axes.axvline(1, color=COLOURS["nginx"], linestyle=":", label="nginx")
    better = ["more" if figure.goal and figure.goal.at_least else "less" for figure in figures]
    labels = [f"{figure.title} ({word} is better)" for figure, word in zip(figures, better)]
    axes.set_yticks(range(len(figures)), labels[::-1])
    axes.set_ylim(-0.6, len(figures) - 0.4)
    axes.set_xscale("log")
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    axes.minorticks_off()
    axes.set_title(f"Ratio to nginx, upstream {'over TLS' if tls else 'in the clear'}")
    axes.legend()


def flatness(
    axes: Any,
    records: report.Records,
    tls: bool,
    prefix: str,
    points: tuple[int, ...],
    title: str,
    x: str,
) -> None:
    for name, colour in COLOURS.items():
        found = [
            (point, spread.median)
            for point in points
            if (spread := records.spread(f"{prefix}{point}", name, tls))
        ]
        if found:
            axes.plot(*zip(*found), "o-", color=colour, label=name)
    axes.set(
        xscale="log",
        yscale="log" if "body" in prefix else "linear",
        xlabel=x,
        ylabel="CPU µs",
        title=title,
    )
    if "body" not in prefix:
        axes.set_ylim(bottom=0)
    axes.legend()


def age(axes: Any, slots: list[dict[str, float]]) -> None:
    seconds = [slot["age"] for slot in slots]
    axes.plot(
        seconds, [slot["cpu_request"] for slot in slots], "o-", label="CPU µs a request, c=16"
    )
    axes.plot(
        seconds, [slot["cpu_event"] for slot in slots], "o-", label="CPU µs an event, 100 x 50/s"
    )
    axes.plot(seconds, [slot["pss"] / 1024 for slot in slots], "o-", label="MiB (PSS)")
    axes.set(xlabel="seconds at load", title="Age")
    axes.set_ylim(bottom=0)
    axes.legend()


def main() -> None:
    bench = json.loads(pathlib.Path(sys.argv[1]).read_text())
    records = report.Records(bench["records"])
    kinds = [tls for tls in (True, False) if "xaiproxy" in records.targets(tls)]
    panels: list[Callable[[Any], None]] = [
        functools.partial(ratios, records=records, tls=tls) for tls in kinds
    ]
    if kinds and records.spread("flat_streams_100", "xaiproxy", kinds[0]):
        panels.append(
            lambda axes: flatness(
                axes,
                records,
                kinds[0],
                "flat_streams_",
                measurements.STREAMS,
                "CPU an event; 5,000 events/s over all streams",
                "streams",
            )
        )
        panels.append(
            lambda axes: flatness(
                axes,
                records,
                kinds[0],
                "flat_body_",
                measurements.BODIES,
                "CPU a request",
                "bytes of its body",
            )
        )
    if bench.get("age"):
        panels.append(lambda axes: age(axes, bench["age"]))
    if not panels:
        return
    figure, all_axes = pyplot.subplots(
        len(panels), 1, figsize=(10, 5 * len(panels)), squeeze=False, layout="constrained"
    )
    for panel, axes in zip(panels, all_axes[:, 0]):
        panel(axes)
    for ending in ("svg", "png"):
        figure.savefig(pathlib.Path(sys.argv[2]) / f"bench.{ending}")


if __name__ == "__main__":
    main()

"""Measure xaiproxy beside nginx, reverse proxies in Go and Rust, and LiteLLM.

It prints a table and writes bench.json, bench.svg and bench.png.

Everything runs on loopback, the measured proxy on core 0, load client and
upstream on core 1; the other proxies are stopped meanwhile. What is needed is
installed (Debian, as root) or named. Ctrl-C ends everything.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from xaiproxy import command

from . import check, machine, measurements, report
from .measurements import Run
from .targets import (
    REVERSE_PROXIES,
    Direct,
    LiteLLM,
    Nginx,
    Other,
    Rotating,
    Target,
    Upstream,
    Xaiproxy,
)

FAILED, INTERRUPTED = 1, 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RESULTS = machine.FOLDER / "results"


EXAMPLES = """\
  bin/bench                               measure everything
  bin/bench --quick                       what a change needs; two minutes
  bin/bench --quick --against ../before   compared with another checkout
"""


def parser() -> argparse.ArgumentParser:
    options = command.ArgumentParser(EXAMPLES, prog="bin/bench", description=__doc__)
    options.add_argument(
        "--quick",
        action="store_true",
        help="what matters for judging a change, in two minutes: TLS upstream only",
    )
    options.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="how often each is measured (default: 3)"
    )
    options.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"only these runs (wildcards): {', '.join(run.name for run in all_runs())}",
    )
    options.add_argument(
        "--against",
        type=pathlib.Path,
        metavar="FOLDER",
        help="measure this checkout of xaiproxy, too",
    )
    options.add_argument(
        "--litellm",
        action="store_true",
        help="LiteLLM with --quick, too (its installation takes a while)",
    )
    options.add_argument(
        "--reverse-proxies",
        action="store_true",
        help="reverse proxies in Go and Rust with --quick or --only, too",
    )
    options.add_argument("--plain", action="store_true", help="only with the upstream in the clear")
    options.add_argument(
        "--age",
        type=int,
        default=0,
        metavar="SECONDS",
        help="also: memory and CPU over this time at load",
    )
    options.add_argument(
        "--out",
        type=pathlib.Path,
        default=RESULTS,
        metavar="FOLDER",
        help="where bench.json and bench.svg go (default: .bench/results)",
    )
    options.add_argument(
        "--check",
        action="store_true",
        help="instead: show that the load client is not the bottleneck",
    )
    options.add_argument(
        "--table", action="store_true", help="instead: print the table of the bench.json in --out"
    )
    return options


def whole(options: argparse.Namespace) -> bool:
    """Whether every measurement is made that this machine allows."""
    return not (options.quick or options.check or options.only)


def targets(options: argparse.Namespace) -> dict[str, type[Target]]:
    """By name. Reverse proxies that cannot be compiled are left out, with a line each."""
    kinds: list[type[Target]] = [Direct, Nginx, Xaiproxy, Rotating, LiteLLM]
    if options.against:
        Other.checkout = options.against.resolve()
        kinds.append(Other)
    if options.reverse_proxies or whole(options):
        for kind in REVERSE_PROXIES:
            try:
                kind.build()
                kinds.append(kind)
            except machine.Unavailable as missing:
                machine.log(f"without {kind.name}, which {missing}")
    return {kind.name: kind for kind in kinds}


def all_runs() -> list[Run]:
    return [*measurements.RUNS, *measurements.HELD, *measurements.FLATNESS, *measurements.LITELLM]


def runs_of_round(options: argparse.Namespace, round: int, main: bool) -> list[Run]:
    """`main`: whether this is the kind of upstream that users have, the only one for runs that take
    long.
    """
    runs = [*measurements.RUNS]
    runs += measurements.HELD if round == 1 else []
    runs += measurements.FLATNESS if round == 1 and main else []
    if options.only:
        runs += measurements.LITELLM
        return [
            run for run in runs if any(fnmatch.fnmatch(run.name, name) for name in options.only)
        ]
    if options.quick:
        runs = [run for run in runs if run.quick]
    return runs + (list(measurements.LITELLM) if options.litellm or not options.quick else [])


class Bench:
    """The targets, started when first needed, and the records of their runs."""

    def __init__(self, folder: pathlib.Path, options: argparse.Namespace):
        self.folder, self.options = folder, options
        self.classes = targets(options)
        self.upstream = Upstream(folder)
        self.running: dict[tuple[str, bool], Target] = {}
        # Those that did not start are not started again: each attempt may take a minute.
        self.absent: set[str] = set()
        self.records: list[dict[str, Any]] = []

    def close(self) -> None:
        for target in self.running.values():
            target.close()
        self.upstream.close()

    def started(self, name: str, tls: bool) -> Target:
        if name in self.absent:
            raise machine.Unavailable("it did not start for an earlier run")
        folder = self.folder / f"{name}-{time.monotonic_ns()}"
        try:
            return self.classes[name](self.upstream, tls, folder).start()
        except machine.Unavailable:
            self.absent.add(name)
            raise

    @contextlib.contextmanager
    def turn(self, name: str, tls: bool, fresh: bool) -> Iterator[Target]:
        """The target, running. All others are stopped."""
        if fresh:
            # Shared pages would be divided among more processes than in service.
            while self.running:
                self.running.popitem()[1].close()
            target = self.started(name, tls)
            try:
                yield target
            finally:
                target.close()
            return
        if (name, tls) not in self.running:
            self.running[name, tls] = self.started(name, tls)
        target = self.running[name, tls]
        target.wake()
        try:
            yield target
        finally:
            target.rest()

    def plan(self) -> list[tuple[int, bool, Run, str]]:
        plan = []
        standard = [kind.name for kind in REVERSE_PROXIES]
        kinds = (False,) if self.options.plain else (True,) if self.options.quick else (True, False)
        for round in range(1, self.options.rounds + 1):
            for tls in kinds:
                for run in runs_of_round(self.options, round, tls == kinds[0]):
                    plan += [
                        (round, tls, run, name)
                        for name in (*run.targets, *(standard if run.quick else ()))
                        if name in self.classes and not (name == "direct" and tls)
                    ]
        return plan

    def measure(self) -> None:
        plan = self.plan()
        began, planned, done = time.monotonic(), sum(step[2].seconds for step in plan), 0.0
        for count, (round, tls, run, name) in enumerate(plan, 1):
            record: dict[str, Any] = {
                "round": round,
                "tls": tls,
                "run": run.name,
                "target": name,
                "figures": {},
            }
            try:
                with self.turn(name, tls, run.fresh) as target:
                    result = measurements.measure(run, target, 1 if self.options.quick else 2)
                found = {
                    figure.name: figure.value(result)
                    for figure in run.figures
                    if name != "direct" or "cpu" not in figure.name
                }
                record |= {
                    "busy": result["busy"],
                    "disturbed": result["disturbed"],
                    "result": result,
                    "figures": found,
                }
                shown = ", ".join(
                    f"{figure.title} {report.number(found[figure.name])}"
                    for figure in run.figures[:2]
                    if figure.name in found
                )
            except (measurements.Wrong, machine.Unavailable) as wrong:
                record["wrong"] = shown = str(wrong)
            self.records.append(record)
            done += run.seconds
            left = (time.monotonic() - began) / done * (planned - done)
            clock = f"{int(left) // 60}:{int(left) % 60:02}"
            machine.log(f"[{count}/{len(plan)}, {clock} left] {report.where(record)}: {shown}")

    def age(self, seconds: int) -> list[dict[str, float]]:
        """Memory and CPU of one process under load, in slots of 10 s: short requests and streams in
        turn.
        """
        slots = []
        with self.turn("xaiproxy", not self.options.plain, fresh=True) as target:
            began = time.monotonic()
            while (now := time.monotonic() - began) < seconds:
                requests = measurements.load(
                    target.port, "requests", {"connections": 16, "seconds": 5}, target.pids()
                )
                streams = measurements.load(
                    target.port,
                    "streams",
                    {**measurements.EACH_50, "events": 50, "seconds": 4},
                    target.pids(),
                )
                slots.append(
                    {
                        "age": now,
                        **machine.memory(target.pids()),
                        "cpu_request": 1e6 * requests["cpu"] / requests["answers"],
                        "cpu_event": 1e6 * streams["cpu"] / streams["events"],
                    }
                )
                machine.log(
                    f"age {now:.0f} of {seconds} s: {slots[-1]['pss']:.0f} KiB, "
                    f"{slots[-1]['cpu_request']:.1f} µs a request"
                )
        return slots


def bench(options: argparse.Namespace) -> int:
    with (
        tempfile.TemporaryDirectory(prefix="xaiproxy-bench-") as name,
        contextlib.closing(Bench(pathlib.Path(name), options)) as running,
    ):
        if options.check:
            print(check.report(running))
            return 0
        running.measure()
        found: dict[str, Any] = {"machine": machine.description(), "records": running.records}
        if options.against:
            found["machine"]["other"] = machine.commit(options.against)
        for kind in REVERSE_PROXIES:
            if kind.name in running.classes:
                found["machine"][kind.name] = machine.version(*kind.version)
        if not options.only:
            with running.turn("xaiproxy", not options.plain, fresh=False) as target:
                assert isinstance(target, Xaiproxy)
                found["help_cpu"] = measurements.help_cpu(target)
        if options.age:
            found["age"] = running.age(options.age)
    write(found, options.out)
    print(report.markdown(found))
    return FAILED if any("wrong" in record for record in running.records) else 0


def write(found: dict[str, Any], folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    python = machine.venv("plot", "matplotlib") / "bin/python"
    subprocess.run(
        [python, "-m", "tests.bench.plot", folder.resolve() / "bench.json", folder.resolve()],
        check=True,
        cwd=machine.ROOT,
    )
    machine.log(f"wrote {folder / 'bench.json'}, bench.svg and bench.png")


def interrupt(*_: Any) -> None:
    # A second signal must not keep the first from ending everything that was started.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def print_table(path: pathlib.Path) -> int:
    try:
        text = path.read_text()
    except FileNotFoundError:
        machine.log(f"{path} does not exist; run bin/bench without --table first")
        return machine.UNAVAILABLE
    print(report.markdown(json.loads(text)))
    return 0


def main() -> int:
    options = parser().parse_args()
    for name in options.only:
        if not fnmatch.filter([run.name for run in all_runs()], name):
            parser().error(f"--only {name}: there is no such run")
    if options.rounds < 1:
        parser().error("--rounds takes a number from 1 up")
    if options.table:
        return print_table(options.out / "bench.json")
    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        machine.prepare()
        if options.against:
            subprocess.run([options.against / "bin/.venv-run", "python", "-c", ""], check=True)
        if options.litellm or whole(options):
            machine.venv("litellm", "litellm[proxy]")
        return bench(options)
    except machine.Unavailable as missing:
        machine.log(str(missing))
        return machine.UNAVAILABLE
    except KeyboardInterrupt:
        machine.log("interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

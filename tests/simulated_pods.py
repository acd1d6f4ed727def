"""How long the pods of a shared login are without a valid token: a simulation, and its inputs.

    .venv/bin/python -m tests.simulated_pods                     print the tables
    .venv/bin/python -m tests.simulated_pods docs/scaling.svg    also draw the pods without a token

A token is published once it is refreshed; the kubelet of each pod mounts it some time later. Until
then a pod serves with the former token: if that has expired, or if the API refuses it, requests get
503 token_unavailable with Retry-After. docs/scaling.md explains the results.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

PODS = 1000
# Seconds between two requests in a pod, on average: 100 requests a second in all pods.
INTERVAL = 10.0
# Seconds from a refresh that is due, or asked for, until its token is in the Secret: the refresher's
# poll interval, the proof and claim, the issuer, and two requests to the API server.
PUBLISHED_AFTER = 1.0
# XAI_PROXY_REFRESH_SKEW of conf/kubernetes/shared.
SKEW = 600.0
# Retry-After of a proxy that has asked.
RETRY_AFTER = 45.0
# One whose second retry comes before the mount. The OpenAI libraries ignore one over 60 s.
SHORTER = 30.0
# The retries of the OpenAI libraries by default, and one more.
RETRIES = (2, 3)
LIFETIMES = {"6 h": 21600.0, "1 h": 3600.0, "15 min": 900.0, "5 min": 300.0, "2 min": 120.0}
RUNS = 10
SEED = 1


class Mounting(NamedTuple):
    """Seconds from the publishing of a token until a pod has it, evenly between two bounds."""

    name: str
    shortest: float
    longest: float

    def times(self, chance: random.Random) -> list[float]:
        return [chance.uniform(self.shortest, self.longest) for _ in range(PODS)]


MOUNTINGS = (
    # bin/kubernetes-check: 21 mounts, 1 to 79 s after changes at any moment. A kubelet syncs a pod
    # every 60 to 90 s, and mounts what has changed since.
    Mounting("0 to 90 s", 0, 90),
    # A change soon after a sync, of all pods at once, as measured with a kubelet: the worst case.
    Mounting("74 to 78 s", 74, 78),
)


class Outcome(NamedTuple):
    """`refused`: requests that got 503 at first; `lost`: those that all retries could not save, by
    the number of retries; `longest`: seconds that a pod could not serve
    """

    refused: int
    lost: dict[int, int]
    longest: float


Run = Callable[[random.Random], Outcome]


def arrivals(chance: random.Random, seconds: float) -> list[float]:
    """The times of the requests in a pod."""
    times, now = [], chance.expovariate(1 / INTERVAL)
    while now < seconds:
        times.append(now)
        now += chance.expovariate(1 / INTERVAL)
    return times


def outage(
    chance: random.Random, ends: Sequence[float], retry_after: float = RETRY_AFTER
) -> Outcome:
    """What requests meet in pods without a token from 0 on. `ends`: when each pod has one."""
    refused, lost = 0, dict.fromkeys(RETRIES, 0)
    for end in ends:
        times = arrivals(chance, end)
        refused += len(times)
        for retries in RETRIES:
            lost[retries] += sum(at + retries * retry_after < end for at in times)
    return Outcome(refused, lost, max([*ends, 0.0]))


def rotation(lifetime: float, mounting: Mounting) -> Run:
    """A token that is renewed when it is due."""

    def run(chance: random.Random) -> Outcome:
        mounted = [PUBLISHED_AFTER + each for each in mounting.times(chance)]
        return outage(chance, [max(0.0, each - margin(lifetime)) for each in mounted])

    return run


def margin(lifetime: float) -> float:
    """Seconds before its expiry at which a token is renewed: refresher/schedule.py."""
    return min(lifetime / 2, max(SKEW, lifetime / 5))


def refusal(mounting: Mounting, held: float = 0.0, retry_after: float = RETRY_AFTER) -> Run:
    """A token that the API refuses, which the first request reports.

    `held`: seconds for which the refresher refreshes nothing yet, after another refusal
    """

    def run(chance: random.Random) -> Outcome:
        reported = chance.expovariate(PODS / INTERVAL)
        published = max(reported, held) + PUBLISHED_AFTER
        ends = [published + each for each in mounting.times(chance)]
        return outage(chance, ends, retry_after)

    return run


def averaged(run: Run) -> Outcome:
    """The mean of several runs, and the longest outage of all."""
    chance = random.Random(SEED)
    found = [run(chance) for _ in range(RUNS)]
    return Outcome(
        round(statistics.mean(each.refused for each in found)),
        {
            retries: round(statistics.mean(each.lost[retries] for each in found))
            for retries in RETRIES
        },
        max(each.longest for each in found),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rotations() -> str:
    rows = []
    for name, lifetime in LIFETIMES.items():
        cells = [name, f"{margin(lifetime):,.0f} s"]
        for mounting in MOUNTINGS:
            found = averaged(rotation(lifetime, mounting))
            some = f"{found.refused:,}, for {found.longest:.0f} s at most"
            cells.append(some if found.refused else "none")
        spare = margin(lifetime) - PUBLISHED_AFTER - max(each.longest for each in MOUNTINGS)
        cells.append(f"{max(0.0, spare):,.0f} s")
        rows.append(cells)
    head = ["lifetime", "renewed before expiry"]
    head += [f"503, mounted after {each.name}" for each in MOUNTINGS]
    return table([*head, "the issuer may be away for"], rows)


def refusals() -> str:
    rows = []
    for held, retry_after in ((0.0, RETRY_AFTER), (0.0, SHORTER), (60.0, RETRY_AFTER)):
        for mounting in MOUNTINGS:
            found = averaged(refusal(mounting, held, retry_after))
            cells = [
                f"{held:.0f} s" if held else "at once",
                mounting.name,
                f"{retry_after:.0f} s",
                f"{found.refused:,}",
                *(f"{found.lost[retries]:,}" for retries in RETRIES),
                f"{found.longest:.0f} s",
            ]
            rows.append(cells)
    lost = [f"lost with {retries} retries" for retries in RETRIES]
    head = ["refreshed", "mounted after", "Retry-After", "503", *lost]
    return table([*head, "a pod is out for at most"], rows)


def inputs() -> str:
    return (
        f"Inputs: {PODS:,} pods; in each a request every {INTERVAL:.0f} s, at random; published "
        f"{PUBLISHED_AFTER:.0f} s after a refresh is due or asked for; XAI_PROXY_REFRESH_SKEW="
        f"{SKEW:.0f}; means of {RUNS} runs, seed {SEED}."
    )


# The picture

WIDTH, HEIGHT, LEFT, TOP, SECONDS = 760, 300, 70, 40, 100
RIGHT, BOTTOM = WIDTH - 30, HEIGHT - 50
STYLE = """\
  svg { --page: #ffffff; --ink: #1f2328; --dim: #59636e; --line: #d1d9e0; --one: #0969da; --two: #1a7f37; }
  @media (prefers-color-scheme: dark) {
    svg { --page: #0d1117; --ink: #f0f6fc; --dim: #9198a1; --line: #3d444d; --one: #4493f8; --two: #3fb950; }
  }
  text { font: 12px system-ui, sans-serif; fill: var(--dim); }
  .title { font-size: 14px; font-weight: 600; fill: var(--ink); }
  .page { fill: var(--page); } .grid { stroke: var(--line); }
  .retry { stroke: var(--dim); stroke-dasharray: 4 4; }
  .curve { fill: none; stroke-width: 2.5; }
  .one { stroke: var(--one); } .two { stroke: var(--two); }
  text.one { fill: var(--one); stroke: none; } text.two { fill: var(--two); stroke: none; }
"""
ALT = (
    "After the API refuses a token, the share of pods that answer 503. With mounts after 74 to 78 "
    "seconds it is all of them until second 75, and none after second 80. With mounts after 0 to 90 "
    "seconds it falls evenly to none within 91 seconds."
)


def x(seconds: float) -> float:
    return LEFT + (RIGHT - LEFT) * seconds / SECONDS


def y(share: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * share


def curve(mounting: Mounting, kind: str) -> str:
    """The share of pods without a token over time."""
    ends = sorted(PUBLISHED_AFTER + each for each in mounting.times(random.Random(SEED)))
    points = [(0.0, 1.0)]
    points += [(end, 1 - number / PODS) for number, end in enumerate(ends) if not number % 10]
    points += [(ends[-1], 0.0), (SECONDS, 0.0)]
    path = " ".join(f"{x(at):.1f},{y(share):.1f}" for at, share in points)
    return f'<polyline class="curve {kind}" points="{path}"/>'


def label(at: float, share: float, text: str, kind: str = "", anchor: str = "start") -> str:
    place = f'x="{x(at):.1f}" y="{y(share):.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{text}</text>'


def line(start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    (from_x, from_y), (to_x, to_y) = start, end
    return (
        f'<line class="{kind}" x1="{x(from_x):.1f}" y1="{y(from_y):.1f}" '
        f'x2="{x(to_x):.1f}" y2="{y(to_y):.1f}"/>'
    )


def drawing() -> str:
    title = f"Of {PODS:,} pods, those that answer 503 after the API has refused the token"
    parts = [f'<text class="title" x="{LEFT}" y="22">{title}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [line((0, share), (SECONDS, share), "grid")]
        parts += [label(-1, share - 0.02, f"{share:.0%}", anchor="end")]
    for at in range(0, SECONDS + 1, 10):
        parts.append(label(at, -0.09, f"{at} s", anchor="middle"))
    for number in (1, 2):
        at = number * RETRY_AFTER
        parts += [line((at, 0), (at, 1), "retry")]
        text = f"{'first' if number == 1 else 'second'} retry of a request at 0 s"
        parts += [label(at, -0.17, text, anchor="middle")]
    anytime, worst = MOUNTINGS
    parts += [curve(worst, "one"), curve(anytime, "two")]
    parts += [
        label(72, 0.89, "mounted after 74 to 78 s", "one", "end"),
        label(29, 0.56, "mounted after 0 to 90 s", "two", "end"),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    page = f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>'
    opening = f'{head} aria-label="{ALT}">'
    return "\n".join([opening, f"<style>\n{STYLE}</style>", page, *parts, "</svg>", ""])


def main() -> None:
    print(inputs(), rotations(), refusals(), sep="\n\n")
    for path in sys.argv[1:]:
        Path(path).write_text(drawing())


if __name__ == "__main__":
    main()

"""--status --watch: the summary, redrawn in place on a terminal, else printed when it changes."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator

from xaiproxy import command
from xaiproxy.login import summary_text
from xaiproxy.login.output import Output
from xaiproxy.login.summary import Summary
from xaiproxy.style import DIM

INTERVAL = 2.0  # seconds
# The alternate screen, without a cursor and without the terminal's own line breaks.
ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"


def watch(summarize: Callable[[], Summary], out: Output) -> None:
    """Show the summary until Ctrl-C, which is the normal end."""
    with contextlib.suppress(KeyboardInterrupt):
        if out.style().columns is None:
            _report(summarize, out)
        else:
            _redraw(summarize, out)


def _report(summarize: Callable[[], Summary], out: Output) -> None:
    """Print the summary whenever it has changed, with an empty line between two."""
    former = None
    while True:
        summary = summarize()
        if summary.lasting() != former:
            gap = "" if former is None else "\n"
            former = summary.lasting()
            text = "\n".join(summary_text.lines(summary, out.style()))
            out.event("status", gap + text, **summary.members())
            command.flush_results("the watch ends:")
        time.sleep(INTERVAL)


def _redraw(summarize: Callable[[], Summary], out: Output) -> None:
    lines: list[str] = []
    try:
        with _full_screen(out) as signals:
            while True:
                summary = summarize()
                style = out.style()
                lines = summary_text.lines(summary, style, copyable=False)
                at = time.strftime("%H:%M:%S", time.localtime(summary.at))
                hint = style.paint(DIM, f"{at}, every {INTERVAL:g} s; Ctrl-C ends")
                out.draw(_frame([*lines, "", hint], out.rows()))
                command.flush_results("the watch ends:")
                with contextlib.suppress(queue.Empty):
                    if signals.get(timeout=INTERVAL) == signal.SIGTSTP:
                        _suspend(out)
    finally:
        # The last state stays on the screen.
        out.draw("".join(line + "\n" for line in lines))


def _frame(lines: list[str], rows: int) -> str:
    """The text that replaces the screen in place: it erases nothing before it is written over."""
    return "\x1b[H" + "\x1b[K\n".join(lines[:rows]) + "\x1b[K\x1b[J"


@contextlib.contextmanager
def _full_screen(out: Output) -> Iterator[queue.SimpleQueue[int]]:
    """Yield the signals that the loop handles: a resize and Ctrl-Z."""
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    handlers = {
        signal.SIGWINCH: lambda number, _: signals.put(number),
        signal.SIGTSTP: lambda number, _: signals.put(number),
        # So that the terminal is restored.
        signal.SIGTERM: lambda number, _: sys.exit(128 + number),
    }
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    out.draw(ENTER)
    try:
        yield signals
    finally:
        out.draw(LEAVE)
        for number, handler in former.items():
            signal.signal(number, handler)


def _suspend(out: Output) -> None:
    """Stop as Ctrl-Z does, with the terminal as it was meanwhile."""
    out.draw(LEAVE)
    handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, handler)
    out.draw(ENTER)

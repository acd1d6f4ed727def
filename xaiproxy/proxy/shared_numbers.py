"""The numbers of all workers, which they exchange through files in the run folder.

Each worker writes a file of its own, by its slot: once a second while they change, and before it
answers a request for the numbers of all. So no number that any worker has shown is lost when one of
them is killed, or differs when another one is asked: counters do not fall. A killed worker loses
what it counted in its last second. The next worker of the slot continues its counters.

While a file cannot be written, as on a full disk, all workers show what it had before. A worker
that added its latest numbers would show more than its siblings do, and counters would fall.

A file has two lines of JSON. What the first one has changes all the time, and is no reason to write
the file: an idle proxy keeps no disk busy.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.lock

from xaiproxy import config, errors, folder_file, process_metrics, run_folder
from xaiproxy.proxy import paced_json
from xaiproxy.proxy.numbers import Numbers, OwnNumbers, add
from xaiproxy.proxy.pace import Pace

logger = logging.getLogger(__name__)

FORMAT = 1
INTERVAL = 1.0  # seconds between two writes
SIZE_LIMIT = 1 << 22  # bytes
# What counts of workers that run only, besides `process`.
RUNNING = ("gauges", "lag", "started_at", "trouble", "is_saturated")
# A file that is missing, of another version, or broken.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError)


class SharedNumbers:
    def __init__(
        self,
        own: OwnNumbers,
        settings: config.Config,
        address: str | tuple[str, int],
        slot: int,
        workers: int,
    ):
        """`address`: of the listening socket."""
        self._own = own
        self._settings = settings
        self._paths = [run_folder.numbers(settings, address, one) for one in range(workers)]
        self._path = self._paths[slot]
        # The supervisord that has started this worker.
        self._parent = os.getppid()
        self._saving = gevent.lock.Semaphore()
        # The content of the own file, as it was last written, and its second line.
        self._content = b""
        self._lasting = ""
        self._complained = False
        self._is_closed = False
        # Of former workers of the slot.
        self._former: dict[str, float] = {}
        try:
            run_folder.make(settings)
        except errors.StorageError as error:
            self._complain(error)
        if (former := _parsed(content := _read(self._path), Pace())) is not None:
            self._content = content
            own.recorder.add_former(former["counters"], former["history"])
            self._former = former["sums"]

    def __call__(self) -> Numbers:
        """Those of all workers; only the own ones if they could never be written."""
        self.save()
        own, pace = self._own(), Pace()
        if not self._content:
            add(own.sums, self._former)
            return own
        # This worker runs, although its file may be of the former one of its slot.
        total = Numbers(process={})
        live = {name: getattr(own, name) for name in RUNNING}
        _add_running(total, {**live, "process": process_metrics.measure(pace)})
        siblings = [path for path in self._paths if path != self._path]
        for content in [self._content, *(_in_thread(_read, path) for path in siblings)]:
            plain = _parsed(content, pace)
            pace()
            if plain is not None:
                total.add_plain(plain, pace)
                is_sibling = content is not self._content
                if is_sibling and plain["running"] and _is_running(plain["pid"]):
                    _add_running(total, plain)
                pace()
        total.counters.limit_names(pace)
        return total

    def run(self) -> None:
        """Announce that this worker serves, and write its numbers from now on."""
        if (failure := _in_thread(_announce, run_folder.serving(self._path))) is not None:
            self._complain(failure)
        while True:
            self.save()
            gevent.sleep(INTERVAL)

    def close(self) -> None:
        """At the end of the process."""
        self._is_closed = True
        self.save()

    def save(self) -> None:
        """Write the numbers of this process if they have changed, or are gone."""
        # One after the other, so that a later content is not replaced by an earlier one.
        with self._saving:
            numbers = self._own()
            add(numbers.sums, self._former)
            cpu_seconds = numbers.sums.pop("cpu_seconds")
            pace = Pace()
            lasting = paced_json.dumps(
                {
                    **numbers.plain(),
                    "gauges": numbers.gauges,
                    "trouble": numbers.trouble,
                    "is_saturated": numbers.is_saturated,
                    "running": not self._is_closed,
                },
                pace,
            )
            if lasting == self._lasting and _in_thread(os.path.exists, self._path):
                return
            changing = {
                "format": FORMAT,
                "pid": os.getpid(),
                "cpu_seconds": cpu_seconds,
                "process": process_metrics.measure(pace),
                "lag": numbers.lag,
                "started_at": numbers.started_at,
            }
            content = f"{json.dumps(changing)}\n{lasting}\n".encode()
            if os.getppid() != self._parent:
                # That one was killed, and the file may be of a worker that another one has started.
                return
            # A disk may be slow, and the event loop must not wait for it.
            failure = _in_thread(_write, self._settings, self._path, content)
            if failure is None:
                self._content, self._lasting, self._complained = content, lasting, False
            else:
                self._complain(failure)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            logger.warning(
                "the numbers of this worker cannot be written, so /metrics and the status page "
                "do not have its latest ones: %s",
                error,
            )


def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; it must not raise, since gevent would log a traceback."""
    return gevent.get_hub().threadpool.apply(function, arguments)


def _write(settings: config.Config, path: Path, content: bytes) -> Exception | None:
    """Return what is raised."""
    try:
        if not path.parent.exists():
            run_folder.make(settings)
        folder_file.replace(path, content)
    except (OSError, errors.StorageError) as error:
        return error
    return None


def _announce(link: Path) -> OSError | None:
    """Return what is raised."""
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(str(os.getpid()))
    except OSError as error:
        return error
    return None


def _read(path: Path) -> bytes:
    try:
        return folder_file.read(path, SIZE_LIMIT)[0]
    except OSError:
        return b""


def _parsed(content: bytes, pace: Pace) -> dict[str, Any] | None:
    """The members of a file, in a form that can be added up, or None."""
    try:
        changing, lasting = map(json.loads, content.splitlines())
        pace()
        if changing["format"] != FORMAT:
            return None
        plain = {**changing, **lasting}
        plain["sums"]["cpu_seconds"] = plain["cpu_seconds"]
        trial = Numbers(process={})
        trial.add_plain(plain, pace)
        _add_running(trial, plain)
    except UNREADABLE:
        return None
    return plain


def _add_running(total: Numbers, plain: dict[str, Any]) -> None:
    add(total.gauges, plain["gauges"])
    assert total.process is not None
    add(total.process, plain["process"])
    total.lag = max(total.lag, plain["lag"])
    total.started_at = max(total.started_at, plain["started_at"])
    total.trouble = total.trouble or str(plain["trouble"])
    total.is_saturated |= bool(plain["is_saturated"])
    total.workers += 1


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

"""The plug-in inside supervisord: a FATAL program ends them all with status 70, and no log line blocks.

supervisord gives up on a program that keeps failing at its start, and lives on without it: the container looks
healthy and serves nobody. The usual event listener then sends supervisord a SIGTERM, at which it ends with
status 0, so that `restart: on-failure` leaves the container down. From inside both can be done rightly: the other
programs are stopped in their order and drain, and whoever started supervisord sees a failure.

How it gets there: supervisord imports this module when it reads `[rpcinterface:fatal]` in its configuration. It
calls the factory named there only for a control socket, of which there is none, and forgets what was subscribed
to events before it runs (events.clear() in Supervisor.run). So the import adds a class to the list of tick events:
supervisord makes an instance of each, handing itself over, whenever that many seconds have passed.

supervisord writes its own lines and those of the programs to stdout and waits for the reader, who may have stopped: it
then neither restarts a program nor obeys a signal, and an error of the write can end it. So the import also puts an
Output in the place of both, which writes as line_writer.py says.
"""

import atexit
import os
import sys
from typing import Any

from supervisor import events, loggers
from supervisor.states import ProcessStates, SupervisorStates

from xaiproxy.line_writer import LINE_LIMIT, LineWriter

EXIT_FATAL = 70  # EX_SOFTWARE of sysexits.h
STDOUT = "/dev/fd/1"  # stdout_logfile of a program whose lines go where supervisord's own go
FORMAT = "%(asctime)s %(levelname)s %(message)s\n"  # of supervisord's own lines


class FatalCheck(events.TickEvent):
    period = 1  # seconds; supervisord's loop turns no slower

    def __init__(self, when: int, supervisord: Any):
        super().__init__(when, supervisord)
        sys.stdout.flush()  # lines that wait for room
        # Once it is ending, a program that waits for its next start becomes FATAL too, and that is no failure.
        if supervisord.options.mood == SupervisorStates.RUNNING:
            for group in supervisord.process_groups.values():
                for process in group.processes.values():
                    if process.get_state() == ProcessStates.FATAL:
                        end(supervisord.options, process)


def end(options: Any, process: Any) -> None:
    """Have supervisord stop the other programs, as at a SIGTERM, and then end with status 70."""
    options.logger.critical(
        f"{process.config.name} cannot be kept running ({process.spawnerr}): stopping the rest, then ending with "
        f"status {EXIT_FATAL}; put right what the last lines of {process.config.name} say and start again")
    options.mood = SupervisorStates.SHUTDOWN
    # supervisord's main() always returns 0. This runs after it: everything is stopped, flushed and tidied by then.
    atexit.register(os._exit, EXIT_FATAL)


class Output:
    """Stdout as supervisord's log handlers know a stream. Without `fileno`, they close it at the end."""

    def __init__(self) -> None:
        self._writer = LineWriter(1, notice)

    def write(self, data: "bytes | str") -> None:
        """`data`: lines, or a part of one that is longer than a read of supervisord's."""
        lines = (data if isinstance(data, bytes) else data.encode()).splitlines(keepends=True)
        self._writer.write(line[at:at + LINE_LIMIT] for line in lines for at in range(0, len(line), LINE_LIMIT))

    def flush(self) -> None:
        self._writer.write(())

    def close(self) -> None:
        self._writer.close()


def notice(dropped: int) -> bytes:
    text = f"{dropped} log lines were dropped: nobody read them in time"
    return (FORMAT % loggers.LogRecord(loggers.LevelsByName.WARN, text).asdict()).encode()


def write_programs_lines_to(output: Output) -> None:
    """Have the log of a program at STDOUT written to `output`; supervisord would open the file anew for each."""
    handle_file = loggers.handle_file

    def handle(logger: Any, filename: str, fmt: str, **rotation: Any) -> None:
        if filename == STDOUT:
            handler = loggers.StreamHandler(output)
            handler.setFormat(fmt)
            handler.setLevel(logger.level)
            logger.addHandler(handler)
        else:
            handle_file(logger, filename, fmt, **rotation)
    loggers.handle_file = handle


def rpc_interface(supervisord: Any, **settings: str) -> None:
    """The factory that the section must name; an interface without methods, should a control socket be added."""


if "supervisor.supervisord" in sys.modules:  # not when a test imports this
    events.TICK_EVENTS.append(FatalCheck)
    sys.stdout = Output()
    write_programs_lines_to(sys.stdout)

"""A plug-in for supervisord: a program that cannot run ends all, and no log line blocks.

supervisord gives up on a program that keeps failing at its start, and goes on without it: the
container looks healthy and serves no requests. The usual event listener then sends supervisord a
SIGTERM, which ends it with status 0, so that `restart: on-failure` leaves the container down. From
inside, both can be right: the other programs are stopped in their order and drain, and supervisord
ends with a failure. A program that ends with status 78 is not restarted at all, because a wrong
setting does not heal.

supervisord imports this module when it reads `[rpcinterface:fatal]` in its configuration. It calls
the factory that is named there only for a control socket, which is missing, and clears the
subscriptions to events before it runs (Supervisor.run calls events.clear). So the import changes
what exists by then:

- FatalCheck joins the list of tick events. supervisord makes an instance of each, with itself as an
  argument, whenever `period` seconds have passed.
- An Output replaces stdout and writes as line_writer.py describes. supervisord writes its own lines
  and those of the programs there, and would wait for a stopped reader: it would then neither
  restart a program nor obey a signal, and a write error could end it.
- finish, fork, get_path and setsignals replace supervisord's methods of these names.
"""

import atexit
import ctypes
import os
import signal
import sys
import sysconfig
from typing import Any

from supervisor import events, loggers, options, process
from supervisor.states import ProcessStates, SupervisorStates

from xaiproxy import command, errors
from xaiproxy.line_writer import DROPPED, LINE_LIMIT, LineWriter

EXIT_FATAL = 70  # EX_SOFTWARE of sysexits.h
STDOUT = "/dev/fd/1"  # stdout_logfile of a program whose lines follow supervisord's own
FORMAT = "%(asctime)s %(levelname)s %(message)s\n"  # of supervisord's own lines
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class FatalCheck(events.TickEvent):  # type: ignore[misc]  # supervisor is untyped
    period = 1  # seconds; supervisord's loop is no slower

    def __init__(self, when: int, supervisord: Any):
        super().__init__(when, supervisord)
        # Write lines that wait for room.
        sys.stdout.flush()
        for group in supervisord.process_groups.values():
            for program in group.processes.values():
                if program.get_state() == ProcessStates.FATAL:
                    end(program, program.spawnerr)


def end(program: Any, reason: str) -> None:
    """Have supervisord stop the other programs, as after a SIGTERM, and then end with status 70."""
    server = program.config.options
    # While supervisord stops, a program between two starts becomes FATAL, too: that is no failure.
    if server.mood != SupervisorStates.RUNNING:
        return
    server.logger.critical(
        f"{program.config.name} cannot be kept running ({reason}): stopping the rest, then ending "
        f"with status {EXIT_FATAL}; correct the cause in the last lines of {program.config.name}, "
        "and start again"
    )
    server.mood = SupervisorStates.SHUTDOWN
    # supervisord's main() always returns 0. This runs after it, when all is stopped and flushed.
    atexit.register(os._exit, EXIT_FATAL)


_finish = process.Subprocess.finish


def finish(self: Any, pid: int, status: int) -> None:
    """Subprocess.finish, called when a program has ended.

    supervisord itself does not keep the status of a program that ended early.
    """
    logs = [getattr(dispatcher, "normallog", None) for dispatcher in self.dispatchers.values()]
    _finish(self, pid, status)
    for log in filter(None, logs):
        log.close()
    if os.waitstatus_to_exitcode(status) == errors.EXIT_CONFIGURATION:
        end(self, f"exit status {errors.EXIT_CONFIGURATION}")


# Only Linux has it.
_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def fork(self: Any) -> int:
    """ServerOptions.fork, called to start a program.

    The kernel sends the program SIGTERM when supervisord is gone.
    """
    parent = os.getpid()
    # Until its exec, the child has supervisord's signal handlers, which would lose a SIGTERM.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if _prctl:
                _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
                # supervisord may have ended before prctl.
                if os.getppid() != parent:
                    os._exit(errors.EXIT_TRY_AGAIN)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


_get_path = options.ServerOptions.get_path


def get_path(self: Any) -> list[str]:
    """ServerOptions.get_path, the folders with programs: this Python's own comes first."""
    return [sysconfig.get_path("scripts"), *_get_path(self)]


_setsignals = options.ServerOptions.setsignals
_inherited = signal.getsignal(signal.SIGHUP)
_hangup = command.hangup()


def setsignals(self: Any) -> None:
    """ServerOptions.setsignals, by which a closed terminal would have all programs restarted."""
    _setsignals(self)
    # nohup(1)
    if _inherited is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    elif _hangup == signal.SIGTERM:
        signal.signal(
            signal.SIGHUP, lambda _, frame: self.signal_receiver.receive(signal.SIGTERM, frame)
        )


class Output:
    """Stdout for supervisord's log handlers, which close a stream that has no `fileno`."""

    def __init__(self) -> None:
        self._writer = LineWriter(1, notice)

    def write(self, data: bytes | str) -> None:
        """`data`: lines, or a part of one that is longer than LINE_LIMIT."""
        lines = (data if isinstance(data, bytes) else data.encode()).splitlines(keepends=True)
        self._writer.write(
            line[at : at + LINE_LIMIT] for line in lines for at in range(0, len(line), LINE_LIMIT)
        )

    def flush(self) -> None:
        self._writer.write(())

    def close(self) -> None:
        self._writer.close()


class ProgramLines:
    """The output of one program, as a stream for log handlers. `output` gets complete lines.

    A traceback comes in pieces, and lines of the other program must not come between them.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._begun = b""

    def write(self, data: bytes) -> None:
        data = self._begun + data
        end = data.rfind(b"\n") + 1
        if len(data) - end > LINE_LIMIT:
            end = len(data)
        self._begun = data[end:]
        self._output.write(data[:end])

    def flush(self) -> None:
        self._output.flush()

    def close(self) -> None:
        """Complete the last line, at the end of the program."""
        if self._begun:
            self.write(b"\n")


def notice(dropped: int) -> bytes:
    record = loggers.LogRecord(loggers.LevelsByName.WARN, DROPPED % dropped)
    line: str = FORMAT % record.asdict()
    return line.encode()


def write_programs_lines_to(output: Output) -> None:
    """Write the log of each program at STDOUT to `output`, instead of opening the file again."""
    handle_file = loggers.handle_file

    def handle(logger: Any, filename: str, fmt: str, **rotation: Any) -> None:
        if filename == STDOUT:
            handler = loggers.StreamHandler(ProgramLines(output))
            handler.setFormat(fmt)
            handler.setLevel(logger.level)
            logger.addHandler(handler)
        else:
            handle_file(logger, filename, fmt, **rotation)

    loggers.handle_file = handle


def rpc_interface(supervisord: Any, **settings: str) -> None:
    """The factory that the section must name; its interface, for control sockets, is empty."""


# Not when a test imports this module.
if "supervisor.supervisord" in sys.modules:
    command.open_standard_streams()
    events.TICK_EVENTS.append(FatalCheck)
    process.Subprocess.finish = finish
    options.ServerOptions.fork = fork
    options.ServerOptions.get_path = get_path
    options.ServerOptions.setsignals = setsignals
    output = Output()
    sys.stdout = output
    write_programs_lines_to(output)

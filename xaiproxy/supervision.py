"""The plug-in inside supervisord: a program that cannot run ends them all with status 70, and no log line blocks.

supervisord gives up on a program that keeps failing at its start, and lives on without it: the container looks
healthy and serves nobody. The usual event listener then sends supervisord a SIGTERM, at which it ends with
status 0, so that `restart: on-failure` leaves the container down. From inside both can be done rightly: the other
programs are stopped in their order and drain, and whoever started supervisord sees a failure. A program that ends
with status 78 is not started again at all: a wrong setting does not heal.

How it gets there: supervisord imports this module when it reads `[rpcinterface:fatal]` in its configuration. It
calls the factory named there only for a control socket, of which there is none, and forgets what was subscribed
to events before it runs (events.clear() in Supervisor.run). So the import changes what is there already:

- FatalCheck joins the list of tick events: supervisord makes an instance of each, handing itself over, whenever
  that many seconds have passed.
- An Output takes the place of stdout, and writes as line_writer.py describes. supervisord writes its own lines and
  those of the programs there and would wait for the reader, who may have stopped: it then neither restarts a program
  nor obeys a signal, and an error of the write can end it.
- finish, fork, get_path and setsignals take the place of supervisord's methods of these names.
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
from xaiproxy.line_writer import LINE_LIMIT, LineWriter

EXIT_FATAL = 70  # EX_SOFTWARE of sysexits.h
STDOUT = "/dev/fd/1"  # stdout_logfile of a program whose lines go where supervisord's own go
FORMAT = "%(asctime)s %(levelname)s %(message)s\n"  # of supervisord's own lines
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class FatalCheck(events.TickEvent):
    period = 1  # seconds; supervisord's loop turns no slower

    def __init__(self, when: int, supervisord: Any):
        super().__init__(when, supervisord)
        sys.stdout.flush()  # lines that wait for room
        for group in supervisord.process_groups.values():
            for program in group.processes.values():
                if program.get_state() == ProcessStates.FATAL:
                    end(program, program.spawnerr)


def end(program: Any, reason: str) -> None:
    """Have supervisord stop the other programs, as at a SIGTERM, and then end with status 70."""
    server = program.config.options
    # Once supervisord is stopping, a program that waits for its next start becomes FATAL too, which is no failure.
    if server.mood != SupervisorStates.RUNNING:
        return
    server.logger.critical(
        f"{program.config.name} cannot be kept running ({reason}): stopping the rest, then ending with "
        f"status {EXIT_FATAL}; put right what the last lines of {program.config.name} say and start again"
    )
    server.mood = SupervisorStates.SHUTDOWN
    # supervisord's main() always returns 0. This runs after it: everything is stopped, flushed and tidied by then.
    atexit.register(os._exit, EXIT_FATAL)


_finish = process.Subprocess.finish


def finish(self: Any, pid: int, status: int) -> None:
    """Subprocess.finish, called when a program has ended. supervisord itself forgets the status if it ended early."""
    logs = [getattr(dispatcher, "normallog", None) for dispatcher in self.dispatchers.values()]
    _finish(self, pid, status)
    for log in filter(None, logs):
        log.close()
    if os.waitstatus_to_exitcode(status) == errors.EXIT_CONFIGURATION:
        end(self, f"exit status {errors.EXIT_CONFIGURATION}")


_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux


def fork(self: Any) -> int:
    """ServerOptions.fork, called to start a program: the kernel sends the program SIGTERM when supervisord is gone."""
    parent = os.getpid()
    # Until its exec the child has supervisord's signal handlers, which would lose a SIGTERM.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if _prctl:
                _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:
                    os._exit(errors.EXIT_TRY_AGAIN)  # supervisord ended before prctl
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


_get_path = options.ServerOptions.get_path


def get_path(self: Any) -> list[str]:
    """ServerOptions.get_path, the folders to find programs in: first the one of this Python's own, then PATH's."""
    return [sysconfig.get_path("scripts"), *_get_path(self)]


_setsignals = options.ServerOptions.setsignals
_inherited = signal.getsignal(signal.SIGHUP)
_hangup = command.hangup()


def setsignals(self: Any) -> None:
    """ServerOptions.setsignals, with which supervisord would restart the programs when its terminal is closed."""
    _setsignals(self)
    if _inherited is signal.SIG_IGN:  # nohup(1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    elif _hangup == signal.SIGTERM:
        signal.signal(
            signal.SIGHUP, lambda _, frame: self.signal_receiver.receive(signal.SIGTERM, frame)
        )


class Output:
    """Stdout as supervisord's log handlers know a stream. Without `fileno`, they close it at the end."""

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
    """The output of one program, as a stream for log handlers. It reaches `output` in complete lines.

    A traceback is written in pieces, which the lines of the other program must not separate.
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
    text = f"{dropped} log lines were dropped: nobody read them in time"
    return (FORMAT % loggers.LogRecord(loggers.LevelsByName.WARN, text).asdict()).encode()


def write_programs_lines_to(output: Output) -> None:
    """Have the log of a program at STDOUT written to `output`; supervisord would open the file anew for each."""
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
    """The factory that the section must name; an interface without methods, should a control socket be added."""


if "supervisor.supervisord" in sys.modules:  # not when a test imports this
    command.open_standard_streams()
    events.TICK_EVENTS.append(FatalCheck)
    process.Subprocess.finish = finish
    options.ServerOptions.fork = fork
    options.ServerOptions.get_path = get_path
    options.ServerOptions.setsignals = setsignals
    sys.stdout = Output()
    write_programs_lines_to(sys.stdout)

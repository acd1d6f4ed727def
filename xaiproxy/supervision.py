"""A plug-in for supervisord: a program that cannot run ends all, and its log is one of ours.

supervisord gives up on a program that keeps failing at its start, and goes on without it: the
container looks healthy and serves no requests. The usual event listener then sends supervisord a
SIGTERM, which ends it with status 0, so that `restart: on-failure` leaves the container down. From
inside, both can be right: the other programs are stopped in their order and drain, and supervisord
ends with a failure. A program that ends with status 78 is not restarted at all, because a wrong
setting does not heal. Only a worker whose siblings serve does not end all: see xai-restart.

supervisord imports this module when it reads `[rpcinterface:fatal]` in its configuration. It calls
the factory that is named there only for a control socket, which is missing, and clears the
subscriptions to events before it runs (Supervisor.run calls events.clear). So the import changes
what exists by then:

- FatalCheck joins the list of tick events. supervisord makes an instance of each, with itself as an
  argument, whenever `period` seconds have passed.
- An Output replaces the streams of log handlers, and writes as line_writer.py describes.
  supervisord would wait for a stopped reader of stdout: it would then neither restart a program nor
  obey a signal, and a write error could end it.
- Every line at STDOUT gets the format of log.py: supervisord's own, the programs' log, which has it
  already, and what they write besides, such as the sentence with which they refuse to start. Lines
  that supervisord logs while it reads its configuration are written later, so they have it, too.
- finish, send_signal, stop_all, fork, prepare_child_fds, get_path, get_signal, setsignals,
  cleanup_fds and init_normallog replace supervisord's methods of these names.

Two outputs keep their own format: the error of a supervisord that refuses to start, and the
traceback of one that crashes. Both go to stderr.
"""

import atexit
import os
import re
import signal
import sys
import sysconfig
import time
from collections.abc import Iterable
from typing import Any, ClassVar

from supervisor import dispatchers, events, loggers, options, process
from supervisor.states import ProcessStates, SupervisorStates

from xaiproxy import (
    command,
    config,
    dropped_lines,
    errors,
    inherited_socket,
    kernel,
    log,
    run_folder,
)
from xaiproxy.line_writer import DROPPED, LINE_LIMIT, LineWriter

EXIT_FATAL = 70  # EX_SOFTWARE of sysexits.h
# When a program has ended because of a wrong setting. xai-serve has another one.
exit_configuration = EXIT_FATAL
STDOUT = "/dev/fd/1"  # stdout_logfile of a program whose lines follow supervisord's own
NAME = "supervisord"  # in its own lines
LOG_FORMAT = "XAI_PROXY_LOG_FORMAT"
# As in the programs' lines; what is below INFO is DEBUG.
LEVELS = {
    loggers.LevelsByName.CRIT: "CRITICAL",
    loggers.LevelsByName.ERRO: "ERROR",
    loggers.LevelsByName.WARN: "WARNING",
    loggers.LevelsByName.INFO: "INFO",
}
# How a line of log.py begins, in JSON and as text.
LOG_LINE = re.compile(rb'(\{"time": ")?20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z[" ]')


class FatalCheck(events.TickEvent):  # type: ignore[misc]  # supervisor is untyped
    period = 1  # seconds; supervisord's loop is no slower
    output: Any = None  # an Output
    # Workers that cannot be kept running, and whose log lines have been written.
    named: ClassVar[set[str]] = set()

    def __init__(self, when: int, supervisord: Any):
        super().__init__(when, supervisord)
        # Write lines that wait for room.
        self.output.flush()
        if supervisord.options.mood == SupervisorStates.RUNNING:
            for group in supervisord.process_groups.values():
                self.check(list(group.processes.values()))

    def check(self, programs: list[Any]) -> None:
        """`programs`: of one group."""
        for program in programs:
            if program.get_state() != ProcessStates.FATAL:
                self.named.discard(program.config.name)
                continue
            if all(map(is_down, programs)):
                end(program, program.spawnerr)
                return
            if program.config.name not in self.named and has_running(programs):
                self.named.add(program.config.name)
                name_fatal(program)


def is_down(program: Any) -> bool:
    """Whether supervisord does not start the program any more. See send_signal."""
    state = program.get_state()
    return state == ProcessStates.FATAL or (
        state == ProcessStates.STOPPED and bool(program.laststart)
    )


def has_running(programs: Iterable[Any]) -> bool:
    return any(program.get_state() == ProcessStates.RUNNING for program in programs)


def name_fatal(program: Any) -> None:
    """Log that one of several workers is missing."""
    name = program.config.name
    program.config.options.logger.critical(
        f"{name} cannot be kept running ({program.spawnerr}), and the other workers serve without "
        f"it; correct the cause in the last lines of {name}, then run "
        f"{errors.typed('xai-restart')}"
    )


def end(program: Any, reason: str, status: int = EXIT_FATAL) -> None:
    """Have supervisord stop the other programs, as after a SIGTERM, and then end with `status`."""
    server = program.config.options
    # While supervisord stops, a program between two starts becomes FATAL, too: that is no failure.
    if server.mood != SupervisorStates.RUNNING:
        return
    server.logger.critical(
        f"{program.config.name} cannot be kept running ({reason}): stopping the rest, then ending "
        f"with status {status}; correct the cause in the last lines of {program.config.name}, "
        "and start again"
    )
    server.mood = SupervisorStates.SHUTDOWN
    # supervisord's main() always returns 0. This runs after it, when all is stopped and flushed.
    atexit.register(os._exit, status)


_hangup = command.hangup()
_finish = process.Subprocess.finish


def finish(self: Any, pid: int, status: int) -> None:
    """Subprocess.finish, called when a program has ended.

    supervisord itself does not keep the status of a program that ended early.
    """
    logs = [getattr(dispatcher, "normallog", None) for dispatcher in self.dispatchers.values()]
    _finish(self, pid, status)
    for program_log in filter(None, logs):
        program_log.close()
    if os.waitstatus_to_exitcode(status) == errors.EXIT_CONFIGURATION:
        self.spawnerr = f"exit status {errors.EXIT_CONFIGURATION}"
        siblings = [one for one in self.group.processes.values() if one is not self]
        if has_running(siblings):
            # Process.give_up does this, but only for a program that ended during its start.
            self.delay = self.backoff = 0
            self.system_stop = True
            self.change_state(ProcessStates.FATAL)
        else:
            end(self, self.spawnerr, exit_configuration)


_signal = process.Subprocess.signal


def send_signal(self: Any, number: int) -> str | None:
    """Subprocess.signal, called for a client of the control socket: SIGTERM replaces the program.

    supervisord would take its end for a failure if the program has just been started, and would
    send it a second SIGTERM at a shutdown.

    A worker gets REPLACE, not SIGTERM.
    """
    error: str | None = None
    if number != signal.SIGTERM:
        error = _signal(self, number)
    else:
        if self.get_state() != ProcessStates.STOPPING:
            usual = self.config.stopsignal
            if self.group.config.name == run_folder.WORKERS:
                self.config.stopsignal = run_folder.REPLACE
            error = self.stop()
            self.config.stopsignal = usual
        # Subprocess.transition starts a stopped program that seems never to have been started.
        self.laststart = 0
    return error


_stop_all = process.ProcessGroup.stop_all


def stop_all(self: Any) -> None:
    """ProcessGroup.stop_all, called at a shutdown and, by `supervisorctl reload`, at a restart.

    A shutdown closes the listening sockets of the workers here. Each worker has a copy: once the
    last one stops accepting, new connections are refused, and do not wait for the end.
    """
    if self.config.options.mood == SupervisorStates.SHUTDOWN:
        inherited_socket.close_handed_down()
    _stop_all(self)


def fork(self: Any) -> int:
    """ServerOptions.fork, called to start a program.

    On Linux, the kernel sends the program SIGTERM when supervisord is gone. Until the program
    handles SIGHUP, it ignores one that get_signal passes on.
    """
    parent = os.getpid()
    # Until its exec, the child has supervisord's signal handlers, which would lose a SIGTERM.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if _hangup == signal.SIGHUP:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            if not kernel.end_with_parent(parent):
                os._exit(errors.EXIT_TRY_AGAIN)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


_prepare_child_fds = process.Subprocess._prepare_child_fds


def prepare_child_fds(self: Any) -> None:
    """Subprocess._prepare_child_fds: a worker gets the sockets that inherited_socket.take returns.

    An [fcgi-program] would get one that supervisord opens, without IPv6, and not two.
    """
    if self.group.config.name != run_folder.WORKERS or not inherited_socket.handed_down:
        _prepare_child_fds(self)
        return
    self.pipes["child_stdin"], *others = inherited_socket.handed_down
    # The options are those of the forked child. Its other descriptors are closed below.
    server = self.config.options
    minfds, server.minfds = server.minfds, 0
    _prepare_child_fds(self)
    for number, fd in enumerate(others, inherited_socket.FIRST):
        os.dup2(fd, number)
        # dup2 does nothing if both numbers are equal.
        os.set_inheritable(number, True)
    os.closerange(inherited_socket.FIRST + len(others), minfds)


_get_path = options.ServerOptions.get_path


def get_path(self: Any) -> list[str]:
    """ServerOptions.get_path, the folders with programs.

    First come this Python's own and that of the running script, which differ after `pip install
    --user`.
    """
    own = [sysconfig.get_path("scripts"), os.path.dirname(os.path.realpath(sys.argv[0]))]
    return [*own, *_get_path(self)]


_setsignals = options.ServerOptions.setsignals


def setsignals(self: Any) -> None:
    """ServerOptions.setsignals: a closed terminal ends all programs."""
    _setsignals(self)
    if _hangup == signal.SIGTERM:
        signal.signal(
            signal.SIGHUP, lambda _, frame: self.signal_receiver.receive(signal.SIGTERM, frame)
        )


_get_signal = options.ServerOptions.get_signal


def get_signal(self: Any) -> int | None:
    """ServerOptions.get_signal, called by supervisord's loop.

    Ctrl-C is passed on, as if the program were in the foreground. At the first one, the proxy is
    stopped by SIGINT: its drain begins without XAI_PROXY_DRAIN_DELAY. A second one reaches the
    program that is being stopped: the proxy then aborts its open responses.

    SIGHUP is passed on to all programs, which supervisord would restart: the proxy then reads its
    log level, and the refresher retries.
    """
    number: int | None = _get_signal(self)
    if number == signal.SIGHUP:
        for pid in self.pidhistory:
            self.kill(pid, signal.SIGHUP)
        return None
    if number == signal.SIGINT:
        for pid, program in self.pidhistory.items():
            state, is_proxy = program.get_state(), program.group.config.name == run_folder.WORKERS
            if self.mood != SupervisorStates.RUNNING:
                if state == ProcessStates.STOPPING:
                    self.kill(pid, signal.SIGTERM)
            # One that is starting may not handle the signal yet.
            elif is_proxy and state == ProcessStates.RUNNING:
                program.config.stopsignal = signal.SIGINT
    return number


def cleanup_fds(self: Any) -> None:
    """ServerOptions.cleanup_fds, which closes inherited descriptors at a `supervisorctl reload`.

    The one whose path the programs have stays open, and so do the workers' sockets.
    """
    first_closed = 5
    for kept in sorted((FatalCheck.output.dropped_fd, *inherited_socket.handed_down)):
        os.closerange(first_closed, kept)
        first_closed = max(first_closed, kept + 1)
    os.closerange(first_closed, self.minfds)


def chosen_format() -> str:
    """The XAI_PROXY_LOG_FORMAT that the programs have, who inherit the choice of this process.

    A wrong setting is not reported here: the programs name it when they refuse to start.
    """
    wrong: list[errors.ConfigurationError] = []
    try:
        chosen = config.from_environ(os.environ, complain=wrong.append).log_format
    except errors.ConfigurationError:
        return "auto"
    if chosen == "auto" and not wrong and os.isatty(1):
        # The programs' own stderr is a pipe.
        os.environ[LOG_FORMAT] = chosen = "text"
    return chosen


class Output:
    """Stdout, as a stream of log handlers, which close it because it has no `fileno`."""

    def __init__(self, format: str) -> None:
        self._format = format
        self._line = self.line_format(NAME)
        self._writer = LineWriter(1, self._notice)
        self.dropped_fd = dropped_lines.publish()

    def line_format(self, program: str) -> log.Line:
        return log.line_format(program, self._format, 1)

    def event(self, level: str, message: str, fields: log.Fields) -> None:
        """Write a line of supervisord's own."""
        self.write([self._line(time.time(), level, message, fields)])

    def write(self, lines: Iterable[bytes]) -> None:
        dropped = self._writer.dropped_in_all
        self._writer.write(lines)
        if self._writer.dropped_in_all != dropped:
            dropped_lines.write(self.dropped_fd, self._writer.dropped_in_all)

    def flush(self) -> None:
        self.write(())

    def close(self) -> None:
        self._writer.close()

    def _notice(self, dropped: int) -> bytes:
        return self._line(time.time(), "WARNING", DROPPED % dropped, {})


class OwnLines(loggers.Handler):  # type: ignore[misc]  # supervisor is untyped
    """The log handler of supervisord's own lines. `stream`: an Output."""

    def emit(self, record: Any) -> None:
        message, _, rest = record.asdict()["message"].partition("\n")
        fields = {"traceback": log.end_of_traceback(rest)} if rest else {}
        self.stream.event(LEVELS.get(record.level, "DEBUG"), message, fields)


class ProgramLines:
    """The output of one program, as a stream for log handlers. `output` gets complete lines.

    A traceback comes in pieces, and lines of the other program must not come between them.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._begun = b""
        self.belong_to("")

    def belong_to(self, program: str) -> None:
        self._line = self._output.line_format(program)

    def write(self, data: bytes) -> None:
        data = self._begun + data
        end = data.rfind(b"\n") + 1
        if len(data) - end > LINE_LIMIT:
            end = len(data)
        self._begun = data[end:]
        lines = data[:end].splitlines(keepends=True)
        self._output.write([self._formatted(line) for line in lines if line.strip()])

    def _formatted(self, line: bytes) -> bytes:
        """A line as log.py would write it. Outside of its log a program only reports failures."""
        if LOG_LINE.match(line) and line.endswith(b"\n") and len(line) <= LINE_LIMIT:
            return line
        return self._line(time.time(), "ERROR", line.decode("utf-8", "replace").rstrip(), {})

    def flush(self) -> None:
        self._output.flush()

    def close(self) -> None:
        """Complete the last line, at the end of the program."""
        if self._begun:
            self.write(b"\n")


def write_lines_to(output: Output) -> None:
    """Write supervisord's own lines, and those of each program at STDOUT, to `output`."""
    handle_file = loggers.handle_file

    def handle_own(logger: Any, _fmt: str) -> None:
        handler = OwnLines(output)
        handler.setLevel(logger.level)
        logger.addHandler(handler)

    def handle_programs(logger: Any, filename: str, fmt: str, **rotation: Any) -> None:
        if filename == STDOUT:
            # Not the file, which would be opened again.
            handler = loggers.StreamHandler(ProgramLines(output))
            handler.setFormat(fmt)
            handler.setLevel(logger.level)
            logger.addHandler(handler)
        else:
            handle_file(logger, filename, fmt, **rotation)

    loggers.handle_stdout = handle_own
    loggers.handle_file = handle_programs


_init_normallog = dispatchers.POutputDispatcher._init_normallog


def init_normallog(self: Any) -> None:
    """POutputDispatcher._init_normallog, which makes the log of one program's output."""
    _init_normallog(self)
    for handler in getattr(self.normallog, "handlers", ()):
        if isinstance(handler.stream, ProgramLines):
            handler.stream.belong_to(self.process.config.name)


def rpc_interface(supervisord: Any, **settings: str) -> None:
    """The factory that the section must name; its interface, for control sockets, is empty."""


# Not when a test imports this module.
if "supervisor.supervisord" in sys.modules:
    command.open_standard_streams()
    events.TICK_EVENTS.append(FatalCheck)
    process.Subprocess.finish = finish
    process.Subprocess._prepare_child_fds = prepare_child_fds
    process.Subprocess.signal = send_signal
    process.ProcessGroup.stop_all = stop_all
    options.ServerOptions.fork = fork
    options.ServerOptions.get_path = get_path
    options.ServerOptions.get_signal = get_signal
    options.ServerOptions.setsignals = setsignals
    options.ServerOptions.cleanup_fds = cleanup_fds
    dispatchers.POutputDispatcher._init_normallog = init_normallog
    FatalCheck.output = Output(chosen_format())
    write_lines_to(FatalCheck.output)

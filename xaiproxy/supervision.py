"""The plug-in inside supervisord: a program that became FATAL ends them all, and the exit status is 70.

supervisord gives up on a program that keeps failing at its start, and lives on without it: the container looks
healthy and serves nobody. The usual event listener then sends supervisord a SIGTERM, at which it ends with
status 0, so that `restart: on-failure` leaves the container down. From inside both can be done rightly: the other
programs are stopped in their order and drain, and whoever started supervisord sees a failure.

How it gets there: supervisord imports this module when it reads `[rpcinterface:fatal]` in its configuration. It
calls the factory named there only for a control socket, of which there is none, and forgets what was subscribed
to events before it runs (events.clear() in Supervisor.run). So the import adds a class to the list of tick events:
supervisord makes an instance of each, handing itself over, whenever that many seconds have passed.
"""

import atexit
import os
import stat
import subprocess
import sys
from typing import Any

from supervisor import events
from supervisor.states import ProcessStates, SupervisorStates

EXIT_FATAL = 70  # EX_SOFTWARE of sysexits.h


class FatalCheck(events.TickEvent):
    period = 1  # seconds; supervisord's loop turns no slower

    def __init__(self, when: int, supervisord: Any):
        super().__init__(when, supervisord)
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


def make_stdout_openable() -> None:
    """Put a `cat` behind stdout if need be: supervisord opens /dev/fd/1 anew for the log of each program.

    A socket (systemd's journal) cannot be opened so, nor the pipe or terminal of another user (sudo -u), and what is
    written to a plain file that was opened twice overwrites itself.
    """
    mode = os.fstat(1).st_mode
    if (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)) and os.access("/dev/fd/1", os.W_OK):
        return
    # In a session of its own: it must outlive a Ctrl-C at the terminal, to show what the programs still say.
    cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
    os.dup2(cat.stdin.fileno(), 1)
    cat.stdin.close()


def rpc_interface(supervisord: Any, **settings: str) -> None:
    """The factory that the section must name; an interface without methods, should a control socket be added."""


if "supervisor.supervisord" in sys.modules:  # not when a test imports this
    events.TICK_EVENTS.append(FatalCheck)
    make_stdout_openable()

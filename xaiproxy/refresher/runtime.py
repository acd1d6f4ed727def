"""The clocks of the refresher's process, its pauses, and whether it is to end."""

from collections.abc import Callable

from xaiproxy import log


class Ending(Exception):
    """The process is to end, at a point where nothing can be lost by it."""


class Runtime:
    """`now`: unix time. `uptime`: seconds since the machine started. `ending`: set by signals."""

    def __init__(
        self,
        now: Callable[[], float],
        uptime: Callable[[], float],
        sleep: Callable[[float], object],
    ):
        self.now = now
        self.uptime = uptime
        self.ending = False
        self._sleep = sleep

    def pause(self, seconds: float) -> None:
        # No other call writes log lines that wait for room.
        log.flush()
        self._sleep(seconds)

    def check_ending(self) -> None:
        """Raise Ending if the process is to end."""
        if self.ending:
            raise Ending

"""The proxy with a quicker sweep for dead paths: `quick_sweep_proxy.py INTERVAL SILENCE`.

Both are in seconds. gevent patches first, as in xaiproxy/__main__.py.
"""

from gevent import events, monkey

events.notify_and_call_entry_points = events.notify
monkey.patch_all()

import functools
import sys

from xaiproxy.http1 import dead_paths
from xaiproxy.proxy import command

if __name__ == "__main__":
    sweep = functools.partial(dead_paths.sweep, *map(float, sys.argv[1:]))
    sys.exit(command.serve({}, sweep=sweep))

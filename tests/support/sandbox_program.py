"""`python -m xaiproxy.sandbox`, whose imports a fork server can make in advance.

gevent patches first, as in xaiproxy/sandbox/__main__.py.
"""

from gevent import events, monkey

events.notify_and_call_entry_points = events.notify
monkey.patch_all()

import sys

from xaiproxy.sandbox import command

if __name__ == "__main__":
    sys.exit(command.main())

"""`python -m xaiproxy.sandbox`, whose imports a fork server can make in advance.

gevent patches first, as in xaiproxy/sandbox/__main__.py.
"""

from gevent import monkey

monkey.patch_all()

import sys

from xaiproxy.sandbox import command

if __name__ == "__main__":
    sys.exit(command.main())

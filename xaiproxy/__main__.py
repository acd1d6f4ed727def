"""Process 1, by hand or under supervisord: `python -m xaiproxy`, `xai-proxy`."""

from gevent import monkey

monkey.patch_all()  # before anything imports socket, ssl or requests

import sys

from xaiproxy.proxy.command import main

if __name__ == "__main__":
    sys.exit(main())

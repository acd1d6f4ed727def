"""Process 1, by hand or under supervisord: `python -m xaiproxy`, `xai-proxy`."""

import sys

from gevent import monkey

# Before anything imports socket, ssl or requests.
monkey.patch_all()

from xaiproxy.proxy.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

"""Process 1, by hand or under supervisord: `python -m xaiproxy`, `xai-proxy`."""

import sys

from gevent import events, monkey

# For each module that it patches, gevent looks for plug-ins in the metadata of all packages.
events.notify_and_call_entry_points = events.notify
# Before anything imports socket, ssl or requests.
monkey.patch_all()

from xaiproxy.proxy.command import main, parser  # noqa: E402

__all__ = ["main", "parser"]

if __name__ == "__main__":
    sys.exit(main())

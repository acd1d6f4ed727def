"""Process 1, but every answer is sent as any WSGI server would: iterated, in our own framing.

It patches first, as xaiproxy/__main__.py does.
"""

from gevent import monkey

monkey.patch_all()

import sys
from typing import Any

from xaiproxy.http1 import handler as http_handler
from xaiproxy.proxy import server


class PlainHandler(http_handler.Handler):
    def _can_relay(self, result: Any) -> bool:
        return False


if __name__ == "__main__":
    server.Server.handler_class = PlainHandler
    sys.exit(server.main())

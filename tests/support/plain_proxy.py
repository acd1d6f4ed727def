"""Process 1, but every answer is sent as any WSGI server would: iterated, in our own framing.

It patches first, as xaiproxy/__main__.py does.
"""

from gevent import monkey

monkey.patch_all()

import sys

from xaiproxy.http1 import client_response, handler
from xaiproxy.proxy import command


class PlainResponse(client_response.ClientResponse):
    def _framing(self) -> type:
        return type(None)


if __name__ == "__main__":
    handler.Handler.response_class = PlainResponse
    sys.exit(command.main())

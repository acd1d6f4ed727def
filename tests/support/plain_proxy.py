"""The proxy without relaying: it iterates and reframes every response, as any WSGI server does.

gevent patches first, as in xaiproxy/__main__.py.
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

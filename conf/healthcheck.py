"""The image's health check: whether /healthz of the admin listener answers with status 200.

XAI_PROXY_ADMIN_BIND is in the image's environment, so neither a .env nor XAI_PROXY_BIND, which may
be a Unix socket, has to be read. It runs as `python -I -S` and imports only what is built in or
written in C: 15 ms of CPU time. The modules socket and http.client take 40 and 100 ms.
"""

import _socket
import os
import sys

# Seconds for the connection, and for the response: together less than HEALTHCHECK --timeout.
TIMEOUT = 2
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

address = os.environ.get("XAI_PROXY_ADMIN_BIND", "")
host, _, port = address.rpartition(":")
if not host:
    sys.exit("the health check needs XAI_PROXY_ADMIN_BIND, such as 127.0.0.1:9091")
connection = _socket.socket(_socket.AF_INET6 if host.startswith("[") else _socket.AF_INET)
connection.settimeout(TIMEOUT)
try:
    # 0.0.0.0 and :: lead to this machine, too.
    connection.connect((host.strip("[]"), int(port)))
    connection.sendall(REQUEST)
    status = connection.recv(1024).split(b"\r\n")[0]
except OSError as error:
    sys.exit(f"{address}: {error.strerror or error}")
if not status.startswith(b"HTTP/1.1 200 "):
    sys.exit(f"{address}: {status!r}")

"""The WSGI application under gevent's own pywsgi, without this package's server and handler."""

from gevent import monkey

monkey.patch_all()

import json
import os
import sys

from gevent import pywsgi

from xaiproxy import client_keys, config, token_store
from xaiproxy.http1.pool import Pool
from xaiproxy.proxy import access, app, forward

settings = config.from_environ(os.environ)
store = token_store.TokenStore(settings)
gate = access.Access(settings, client_keys.ClientKeys(settings.client_keys_file))
proxy = forward.Proxy(settings, store, gate, Pool(settings))
application = app.create_app(proxy, store, gate)
server = pywsgi.WSGIServer(("127.0.0.1", 0), application, log=None)
server.start()
line = {"message": f"listening on http://127.0.0.1:{server.server_port}/v1"}
print(json.dumps(line), file=sys.stderr, flush=True)
server.serve_forever()

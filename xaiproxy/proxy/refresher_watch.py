"""Whether the login has a refresher, in the log."""

import logging
import time

import gevent

from xaiproxy import errors, token_store
from xaiproxy.proxy import app

logger = logging.getLogger(__name__)

REFRESHER_LOOK = 2.0  # seconds between two looks for a living refresher, of which the first leaves it time to start


def watch_refresher(store: token_store.TokenStore) -> None:
    """Say once when the login has nobody to renew it, and once when it has again."""
    alive = True
    while True:
        gevent.sleep(REFRESHER_LOOK)
        try:
            renewable = store.current().refresh_token is not None
        except errors.LoginUnusable:
            continue
        if alive and not store.refresher_alive(time.time()):
            gevent.sleep(token_store.OVERDUE)
        if renewable and store.refresher_alive(time.time()) != alive:
            alive = not alive
            if alive:
                logger.info("the refresher is back")
            else:
                logger.warning(
                    "%s; look why xai-refresher does not run",
                    app.readiness_of(store, time.time())[1],
                )

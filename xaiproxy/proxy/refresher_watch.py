"""Log lines about a missing refresher, without which the login expires."""

import logging
import time

import gevent

from xaiproxy import errors, judgement, token_store

logger = logging.getLogger(__name__)

# Seconds. The first interval gives a refresher that is started with the proxy time to appear.
POLL_INTERVAL = 2.0


def watch(store: token_store.TokenStore) -> None:
    """Log once when a renewable login has no refresher, and once when it has one again."""
    alive = True
    while True:
        gevent.sleep(POLL_INTERVAL)
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
                reason = judgement.of(store, time.time()).reason
                logger.warning("%s; check why xai-refresher is not running", reason)

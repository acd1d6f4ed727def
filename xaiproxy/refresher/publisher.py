"""Publishing: a copy of the login without its refresh token is kept where XAI_PROXY_PUBLISH names.

The loop polls it after each save, so that what is published is always on the disk first. A failure
is retried with backoff and never fails a refresh. Once a minute the target is read, and what
another writer has put there is replaced, unless that is newer.
"""

import logging
import math
import random
from pathlib import Path

from xaiproxy import config, errors, token_json, tokens
from xaiproxy.refresher.kubernetes_api import Api
from xaiproxy.refresher.published_file import PublishedFile
from xaiproxy.refresher.published_secret import PublishedSecret
from xaiproxy.refresher.report import Report
from xaiproxy.refresher.runtime import Runtime
from xaiproxy.refresher.target import Target

logger = logging.getLogger(__name__)

CHECK_INTERVAL = 60.0  # seconds between two reads of a target that is up to date
# Seconds; the first wait after a failure, doubled for each further one, and its limit.
BACKOFF, BACKOFF_LIMIT = 1.0, 60.0
RETRY_AFTER_LIMIT = 300.0  # seconds up to which a server's Retry-After is honoured


def target_of(settings: config.Config) -> Target | None:
    """Return the target that the settings name, if any. Raises ConfigurationError."""
    publish = settings.publish
    if isinstance(publish, Path):
        return PublishedFile(publish, settings.token_path)
    if publish is not None:
        return PublishedSecret(Api(settings, publish), publish, settings.instance)
    return None


class Publisher:
    def __init__(self, target: Target | None, report: Report, runtime: Runtime):
        self._target = target
        self._report = report
        self._runtime = runtime
        # The login of the latest attempt, and what of it the target holds.
        self._login: tokens.Login | None = None
        self._published = ""
        self._failures = 0
        # Uptimes before which a new login is not published, and the same one not checked.
        self._not_before = self._next_check = -math.inf

    def poll(self, login: tokens.Login) -> None:
        """Publish `login` if it is a new one, after a failure, and when the target is to be read.

        One without a refresh token may itself have been published by another refresher.
        """
        uptime = self._runtime.uptime()
        due = self._not_before if login is not self._login else self._next_check
        if self._target is None or login.refresh_token is None or uptime < due:
            return
        content = token_json.access_only(login)
        try:
            changed = self._target.publish(content, login.issued_at() or 0.0)
        except errors.PublishError as error:
            self._failed(error)
        else:
            self._succeeded(self._target, content, changed)
        self._login = login

    def _succeeded(self, target: Target, content: str, changed: bool) -> None:
        self._failures, self._not_before = 0, -math.inf
        self._next_check = self._runtime.uptime() + CHECK_INTERVAL
        self._report.log("publish", "")
        if content == self._published and changed:
            logger.warning("%s was changed by another writer; published again", target)
        elif changed:
            logger.info("published in %s", target)
        if content != self._published or changed:
            self._published = content
            self._report.update(published_at=self._runtime.now(), publish_failure="")
        elif self._report.status.publish_failure:
            self._report.update(publish_failure="")

    def _failed(self, error: errors.PublishError) -> None:
        self._failures += 1
        wait = min(BACKOFF * 2.0 ** min(self._failures - 1, 16), BACKOFF_LIMIT)
        # Jitter, so that refreshers do not synchronise.
        wait *= 1 - random.random() / 2
        wait = max(wait, min(error.retry_after or 0.0, RETRY_AFTER_LIMIT))
        self._not_before = self._next_check = self._runtime.uptime() + wait
        self._report.log("publish", f"the login is not published: {error}")
        self._report.update(
            publish_failure=str(error),
            publish_failures=self._report.status.publish_failures + 1,
        )

"""Whether traces are made: only then is anything of opentelemetry imported."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from xaiproxy import config

if TYPE_CHECKING:
    from xaiproxy.proxy.spans import Spans

logger = logging.getLogger(__name__)


def start(settings: config.Config) -> Spans | None:
    """Return the spans of requests, if OTEL_EXPORTER_OTLP_ENDPOINT is set."""
    if not settings.otlp_endpoint:
        return None
    try:
        from xaiproxy.proxy.spans import Spans
    except ModuleNotFoundError as error:
        logger.warning(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but no traces are made, since %s is not "
            "installed: pip install 'xaiproxy[otel]'",
            error.name,
        )
        return None
    return Spans(settings)

"""The address that the proxy listens on."""

from __future__ import annotations

import re
import socket
import time

import gevent.event
import pytest

from xaiproxy import config, errors
from xaiproxy.proxy import listener


def listen_error(**values: str) -> str:
    settings = config.from_environ(
        {f"XAI_PROXY_{name.upper()}": value for name, value in values.items()} | {"HOME": "/"},
        dotenv_path="/dev/null",
    )
    with pytest.raises(errors.ConfigurationError) as caught:
        listener.listen(settings, gevent.event.Event(), timeout=2 * listener.INTERVAL)
    return str(caught.value)


def test_a_port_that_stays_busy_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        began = time.monotonic()
        assert re.fullmatch(
            rf"cannot listen on 127\.0\.0\.1 port {port}: Address already in use; "
            r".*XAI_PROXY_PORT \(--port\)",
            listen_error(port=str(port)),
        )
    assert time.monotonic() - began > 2 * listener.INTERVAL


def test_an_address_of_another_machine_is_an_error() -> None:
    text = listen_error(bind="192.0.2.1")
    assert "192.0.2.1" in text and text.endswith(
        "set XAI_PROXY_BIND and XAI_PROXY_PORT to what this machine allows"
    )

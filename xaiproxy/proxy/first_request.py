"""A request to try, as a command line for the end of the log's start."""

import shlex
from typing import Any

from xaiproxy import client_keys, errors, judgement

# Under these addresses a socket listens on all others, and a client needs one of them.
UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def advice(address: Any, keys: client_keys.ClientKeys, login: judgement.Judgement) -> str:
    """Return "ready", the address and the command line, or what must be done before it works.

    `address`: that of the listening socket, as getsockname returns it.
    """
    steps = []
    if keys.admits_nobody:
        steps.append(f"make a client key with {errors.typed('xai-client-key add NAME')}")
    if not login.ready and login.exit_code == errors.EXIT_SIGN_IN:
        steps.append(errors.SIGN_IN)
    if isinstance(address, str):
        place, url = f"unix:{address}", "http://localhost/v1"
        option = f"--unix-socket {shlex.quote(address)} "
    else:
        place, option = (url := _base_url(*address[:2])), ""
    line = f"try: {_curl(option, url, with_key=keys.required)}"
    if login.ready and not steps:
        return f"ready: {place}; {line}"
    return ", then ".join([*steps, line])


def _base_url(address: str, port: int) -> str:
    host = UNSPECIFIED.get(address, address)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _curl(option: str, url: str, with_key: bool) -> str:
    key = '-H "Authorization: Bearer $XAIPROXY_KEY" ' if with_key else ""
    # A shell may take the brackets of an IPv6 address for a pattern.
    return f"curl {option}{key}{shlex.quote(url + '/models')}"

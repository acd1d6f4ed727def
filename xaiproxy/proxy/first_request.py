"""A request to try, as a command line for the end of the log's start."""

import shlex

from xaiproxy import client_keys, errors, judgement

# Under these addresses a socket listens on all others, and a client needs one of them.
UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def advice(
    address: str, port: int, keys: client_keys.ClientKeys, login: judgement.Judgement
) -> str:
    """Return "ready", the base URL and the command line, or what must be done before it works.

    `address`, `port`: those of the listening socket.
    """
    steps = []
    if keys.admits_nobody:
        steps.append(f"make a client key with {errors.typed('xai-client-key add NAME')}")
    if not login.ready and login.exit_code == errors.EXIT_SIGN_IN:
        steps.append(errors.SIGN_IN)
    url = _base_url(address, port)
    line = f"try: {_curl(url, with_key=keys.required)}"
    if login.ready and not steps:
        return f"ready: {url}; {line}"
    return ", then ".join([*steps, line])


def _base_url(address: str, port: int) -> str:
    host = UNSPECIFIED.get(address, address)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _curl(url: str, with_key: bool) -> str:
    key = '-H "Authorization: Bearer $XAIPROXY_KEY" ' if with_key else ""
    # A shell may take the brackets of an IPv6 address for a pattern.
    return f"curl {key}{shlex.quote(url + '/models')}"

"""A request to try, as a command line for the end of the log's start."""

import shlex

from xaiproxy import client_keys, errors, judgement

# Under these addresses a socket listens on all others, and a client needs one of them.
UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def advice(
    address: str, port: int, keys: client_keys.ClientKeys, login: judgement.Judgement
) -> str:
    """Return the command line, after what must be done so that it works.

    `address`, `port`: those of the listening socket.
    """
    steps = []
    if keys.admits_nobody:
        steps.append(f"make a client key with {errors.typed('xai-client-key add NAME')}")
    if not login.ready and login.exit_code == errors.EXIT_SIGN_IN:
        steps.append(errors.SIGN_IN)
    return ", then ".join([*steps, f"try: {_curl(address, port, with_key=keys.required)}"])


def _curl(address: str, port: int, with_key: bool) -> str:
    host = UNSPECIFIED.get(address, address)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1/models"
    key = '-H "Authorization: Bearer $XAIPROXY_KEY" ' if with_key else ""
    # A shell may take the brackets of an IPv6 address for a pattern.
    return f"curl {key}{shlex.quote(url)}"

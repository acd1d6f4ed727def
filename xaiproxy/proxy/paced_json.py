"""JSON that is written in parts, since json.dumps of a large value would hold up streams."""

from __future__ import annotations

import json
from typing import Any

from xaiproxy.proxy.pace import Pace

PART = 50  # elements of a list


def dumps(value: Any, pace: Pace) -> str:
    """As json.dumps. Between two parts, other greenlets may change the dicts and lists in `value`.

    Only lists may be long.
    """
    if isinstance(value, dict):
        members = [
            f"{json.dumps(str(name))}: {dumps(member, pace)}"
            for name, member in list(value.items())
        ]
        return f"{{{', '.join(members)}}}"
    if isinstance(value, list) and len(value) > PART:
        parts = [value[start : start + PART] for start in range(0, len(value), PART)]
        return f"[{', '.join(dumps(part, pace)[1:-1] for part in parts)}]"
    pace()
    return json.dumps(value)

"""The content of small files of state, which another version of this program may have written."""

import dataclasses
import json
from typing import Any, TypeVar

Record = TypeVar("Record")


def parsed(kind: type[Record], content: str | bytes) -> Record:
    """Return the dataclass `kind` from a JSON object with its members.

    Members that only another version knows are ignored, and those that are missing have their
    defaults. Raises ValueError, TypeError or RecursionError if it is no such object.
    """
    values: Any = json.loads(content)
    if not isinstance(values, dict):
        raise TypeError("not a JSON object")
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names})

"""Which tool the model calls, and with what.

Agents bring tools that run commands and write files. So one is called only when the user has just named it, or when
tool_choice demands one; and then with arguments that mean nothing.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from xaiproxy.sandbox.replies import compact

NOTES = ("system", "developer")  # roles; some agents put one of these last


class Call(NamedTuple):
    name: str
    arguments: Any

    @property
    def json(self) -> str:
        return compact(self.arguments)


def call(body: dict[str, Any], messages: Any) -> Call | None:
    """The call that answers a request, of whichever API, whose conversation ends with `messages`."""
    tools = dict(filter(None, map(_function, body.get("tools") or ())))
    name = _demanded(body.get("tool_choice"), tools) or _named(messages, tools)
    return Call(name, example(tools[name])) if name in tools else None


def _function(tool: dict[str, Any]) -> tuple[str, Any] | None:
    """A function's name and the schema of its arguments, in the words of any of the three APIs."""
    about = tool.get("function", tool)
    schema = about.get("parameters") or about.get("input_schema")
    return (about["name"], schema) if "name" in about and schema else None


def _demanded(choice: Any, tools: dict[str, Any]) -> str | None:
    """The name that tool_choice comes to: that of no tool if it forbids them; None when it leaves it open."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind in ("required", "any"):
        return next(iter(tools), None)
    if kind in ("function", "tool"):
        return choice.get("function", choice).get("name")
    return "none" if kind == "none" else None


def _named(messages: Any, tools: dict[str, Any]) -> str | None:
    """The tool that the user names in what they wrote last; agents put notes of their own before and after it."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    said = [
        message
        for message in messages
        if isinstance(message, dict) and message.get("role") not in NOTES
    ]
    content = said[-1].get("content") if said and said[-1].get("role") == "user" else ""
    if isinstance(content, list):
        content = content[-1].get("text") if content else ""
    return next(
        (name for name in tools if re.search(rf"\b{re.escape(name)}\b", content or "")), None
    )


def example(schema: dict[str, Any]) -> Any:
    """A value that this JSON schema takes, if it is a simple one."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        fields = schema.get("properties", {})
        return {name: example(fields.get(name, {})) for name in schema.get("required", ())}
    return {"string": "sandbox", "integer": 1, "number": 1, "boolean": True, "array": []}.get(
        schema.get("type")
    )

"""The tool that the model calls, and its arguments.

Agents offer tools that run commands and write files. So the model calls one only if the last
message of the user names it or tool_choice requires it, and its arguments are meaningless.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from xaiproxy.sandbox.replies import compact

NOTES = ("system", "developer")  # roles; some agents end with a message of one of these


class Call(NamedTuple):
    name: str
    arguments: Any

    @property
    def json(self) -> str:
        return compact(self.arguments)


def call(body: dict[str, Any], messages: Any) -> Call | None:
    """The call for a request of any of the three APIs. `messages`: its conversation."""
    tools = dict(filter(None, map(_function, body.get("tools") or ())))
    name = _required(body.get("tool_choice"), tools) or _named(messages, tools)
    return Call(name, example(tools[name])) if name in tools else None


def _function(tool: dict[str, Any]) -> tuple[str, Any] | None:
    """A function's name and the schema of its arguments, in the form of any of the three APIs."""
    about = tool.get("function", tool)
    schema = about.get("parameters") or about.get("input_schema")
    return (about["name"], schema) if "name" in about and schema else None


def _required(choice: Any, tools: dict[str, Any]) -> str | None:
    """The tool that tool_choice requires, "none" if it forbids tools, or None."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind in ("required", "any"):
        return next(iter(tools), None)
    if kind in ("function", "tool"):
        name: str | None = choice.get("function", choice).get("name")
        return name
    return "none" if kind == "none" else None


def _named(messages: Any, tools: dict[str, Any]) -> str | None:
    """The tool that the user's last message names; agents put notes before and after it."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    spoken = [
        message
        for message in messages
        if isinstance(message, dict) and message.get("role") not in NOTES
    ]
    last = spoken[-1] if spoken else {}
    content = last.get("content") if last.get("role") == "user" else ""
    if isinstance(content, list):
        content = content[-1].get("text") if content else ""
    return next(
        (name for name in tools if re.search(rf"\b{re.escape(name)}\b", content or "")), None
    )


def example(schema: dict[str, Any]) -> Any:
    """A value that is valid for this JSON schema, if it is a simple one."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        fields = schema.get("properties", {})
        return {name: example(fields.get(name, {})) for name in schema.get("required", ())}
    values = {"string": "sandbox", "integer": 1, "number": 1, "boolean": True, "array": []}
    return values.get(schema.get("type", ""))

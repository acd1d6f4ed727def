"""Which tool the model calls, and with what.

Agents bring tools that run commands and write files. So one is called only when the last message is the user's and names
it, or when tool_choice demands one; and then with arguments that mean nothing.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from xaiproxy.sandbox.replies import compact


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
    """The name that tool_choice comes to: one of none that there is, if it forbids them; None when it leaves it open."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind in ("required", "any"):
        return next(iter(tools), None)
    if kind in ("function", "tool"):
        return choice.get("function", choice).get("name")
    return "none" if kind == "none" else None


def _named(messages: Any, tools: dict[str, Any]) -> str | None:
    last = messages[-1] if isinstance(messages, list) and messages else {"role": "user", "content": messages}
    if not isinstance(last, dict) or last.get("role") != "user":
        return None
    content = last.get("content") or ""
    parts = [{"text": content}] if isinstance(content, str) else content
    text = " ".join(part.get("text") or "" for part in parts if isinstance(part, dict))
    return next((name for name in tools if name in text), None)


def example(schema: dict[str, Any]) -> Any:
    """A value that this JSON schema takes, if it is a simple one."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        fields = schema.get("properties", {})
        return {name: example(fields.get(name, {})) for name in schema.get("required", ())}
    return {"string": "sandbox", "integer": 1, "number": 1, "boolean": True, "array": []}.get(schema.get("type"))

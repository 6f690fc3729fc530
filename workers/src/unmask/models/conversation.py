"""Turns of a conversation as chat templates want them, calls of tools included.

Data files and requests say the same things in different ways; what a template is given is made
here for both, so that a model is asked in the form it was taught in. Templates read the form of
``transformers``: ``{"role", "content"}``, in a turn that calls tools also ``"tool_calls"``, a list of
``{"type": "function", "function": {"name", "arguments"}}`` whose arguments are an object, and in a tool's
turn ``"tool_call_id"`` and ``"name"`` of what it answers. No torch is needed here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

__all__ = ["Tool", "Turn", "tool", "tool_call", "turn"]

Turn: TypeAlias = Mapping[str, Any]
Tool: TypeAlias = Mapping[str, Any]
"""A function that may be called, usually as a JSON schema."""


def turn(
    role: str,
    content: str | None,
    *,
    tool_calls: Sequence[Mapping[str, Any]] = (),
    tool_call_id: str | None = None,
    name: str | None = None,
) -> Turn:
    """One turn; what is left out or empty is not in it, but ``content`` always is, as a text."""
    made: dict[str, Any] = {"role": role, "content": content or ""}
    if tool_calls:
        made["tool_calls"] = list(tool_calls)
    if tool_call_id:
        made["tool_call_id"] = tool_call_id
    if name:
        made["name"] = name
    return made


def tool_call(name: str, arguments: str | Mapping[str, Any], *, call_id: str | None = None) -> dict[str, Any]:
    """A call of the function ``name``.

    Args:
        name: Of the function.
        arguments: An object, or one as JSON text, as the API of OpenAI has it.
        call_id: What a tool's turn refers to.

    Raises:
        ValueError: The arguments are no JSON object.
    """
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": _object(arguments)}}
    return made | ({"id": call_id} if call_id else {})


def tool(described: str | Mapping[str, Any]) -> Tool:
    """A function that may be called, from an object or one as JSON text.

    Raises:
        ValueError: It is no JSON object.
    """
    return _object(described)


def _object(given: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    try:
        read = json.loads(given)
    except RecursionError as error:
        raise ValueError(f"nested too deeply ({error})") from error
    if not isinstance(read, dict):
        raise ValueError(f"got a {type(read).__name__}, expected a JSON object")
    return read

"""What one line of training data says, told by its keys.

| keys | becomes |
|---|---|
| `messages` (+ `tools`) | a conversation |
| `conversations` of `from`, `value` (ShareGPT) | a conversation |
| `prompt`, `completion` | the completion after the prompt, as plain text |
| `instruction` (+ `input`), `output` (Alpaca) | a conversation of two turns |
| `question`, `answer` | a conversation of two turns |
| `text` | plain text |

The first row whose keys are all there is meant; other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from entrenar.errors import DataError

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One sample before it becomes tokens: `messages`, else `prompt` and `text`, else `text` alone.

    Attributes:
        where: "file:line", for messages about it. kind: the row of `FORMATS` that it came by.
    """

    where: str
    kind: str
    text: str = ""
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] | None = None


class _Fields:
    """Typed access to a line's keys; each error says where and which."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self.values = where, values

    def fault(self, reason: str) -> DataError:
        return DataError(f"{self.where}: {reason}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.fault(f"{key!r} must be a string, is {_json_type(value)}")
        return self.utf8(key, value)

    def utf8(self, key: str, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.fault(f"{key!r} holds half of a surrogate pair, which is no character") from None
        return value

    def objects(self, key: str, what: str) -> list[Mapping[str, Any]]:
        value = self.values[key]
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.fault(f"{key!r} must be a list of {what}, is {_json_type(value)}")
        if not value:
            raise self.fault(f"{key!r} is an empty list")
        return value


def _json_type(value: object) -> str:
    names = {
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _text(fields: _Fields) -> dict[str, Any]:
    return {"text": fields.text("text")}


def _completion(fields: _Fields) -> dict[str, Any]:
    return {"prompt": fields.text("prompt"), "text": fields.text("completion")}


def _messages(fields: _Fields) -> dict[str, Any]:
    messages = fields.objects("messages", "messages")
    tools = fields.values.get("tools")
    return {
        "messages": tuple(_message(fields, i, m) for i, m in enumerate(messages)),
        "tools": None if tools is None else tuple(fields.objects("tools", "tools")),
    }


def _message(fields: _Fields, i: int, message: Mapping[str, Any]) -> Message:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise fields.fault(f"message {i}: 'role' must be a string, is {_json_type(role)}")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(content, str):
        raise fields.fault(f"message {i}: 'content' must be a string, is {_json_type(content)}")
    fields.utf8(f"message {i}", role + content)
    return message


_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    "system": "system",
}


def _sharegpt(fields: _Fields) -> dict[str, Any]:
    turns = fields.objects("conversations", "turns")
    messages = []
    for i, turn in enumerate(turns):
        speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise fields.fault(f"turn {i}: 'from' is {speaker!r:.40}; known are {', '.join(_SHAREGPT_ROLES)}")
        messages.append(_message(fields, i, {"role": role, "content": said}))
    return {"messages": tuple(messages)}


def _turns(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})}


def _alpaca(fields: _Fields) -> dict[str, Any]:
    context = fields.text("input", "")
    instruction = fields.text("instruction")
    return _turns(f"{instruction}\n\n{context}" if context else instruction, fields.text("output"))


def _question(fields: _Fields) -> dict[str, Any]:
    return _turns(fields.text("question"), fields.text("answer"))


class Format(NamedTuple):
    keys: tuple[str, ...]
    read: Callable[[_Fields], dict[str, Any]]


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages),
    "conversations": Format(("conversations",), _sharegpt),
    "prompt/completion": Format(("prompt", "completion"), _completion),
    "instruction/output": Format(("instruction", "output"), _alpaca),
    "question/answer": Format(("question", "answer"), _question),
    "text": Format(("text",), _text),
}


def record(where: str, line: object) -> Record:
    """The record in one parsed line. Raises DataError that names `where` and the key at fault."""
    if not isinstance(line, dict):
        raise DataError(f"{where}: must be a JSON object, is {_json_type(line)}")
    for kind, form in FORMATS.items():
        if all(key in line for key in form.keys):
            return Record(where, kind, **form.read(_Fields(where, line)))
    keys = ", ".join(map(repr, list(line)[:8])) or "none"
    raise DataError(f"{where}: keys are {keys}; expected {', '.join(FORMATS)}")

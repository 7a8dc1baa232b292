"""Rows as people's data sets lay them out: plain text, conversations, instructions with answers.

What a row says is taken from keys that are known; every other key (a source, a date) is of no matter. A row without
known keys is refused, so that nothing is learnt from brackets and quotes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from l4pack.errors import UsageError

MAX_ROW = 64 << 20  # characters; what is larger is not one row

CHATS = ("messages", "conversations", "conversation")
PLAIN = ("text", "content")
ASKED = ("instruction", "question", "query", "problem", "prompt", "input")
ANSWERED = ("output", "response", "completion", "answer", "solution", "chosen")
BESIDE = ("input", "context")
SYSTEM = ("system", "system_prompt")
MEDIA = ("image", "images", "image_url", "pixel_values", "video", "videos", "audio", "audios")
KNOWN_KEYS = frozenset((*CHATS, *PLAIN, *ASKED, *ANSWERED, *BESIDE, *SYSTEM, *MEDIA, "tools"))
LAYOUTS = "messages or conversations, instruction and output, prompt and completion, question and answer, or text"

# The tokens that stand for pixels in Llama 4's vocabulary, and LLaVA's mark in the text of a row.
IMAGE = "<|image|>"
IMAGE_TOKENS = (IMAGE, "<|image_start|>", "<|image_end|>", "<|patch|>",
                "<|tile_x_separator|>", "<|tile_y_separator|>")  # fmt: skip
_IMAGE_MARK = "<image>"
_MEDIA_PARTS = ("image", "input_image", "image_url", "video", "video_url", "audio", "input_audio", "file")
_TEXT_PARTS = ("text", "input_text", "output_text")
_ROLES = {
    "human": "user", "user": "user", "system": "system", "developer": "system", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "bing": "assistant",
    "bard": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
    "function_response": "tool", "ipython": "ipython",
}  # fmt: skip


class Left(StrEnum):
    """Why a row is left out."""

    EMPTY = "empty"
    IMAGES = "with_images"
    LONG = "with_images_too_long"


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages with `role` and `content`, and tools they may call. Content with images is a list of parts."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def images(self) -> list[str]:
        """Paths of its images, as they are written there, in order."""
        return [part["path"] for part in self._parts() if part["type"] == "image"]

    @property
    def texts(self) -> list[str]:
        """Everything that is said."""
        whole = [message["content"] for message in self.messages if isinstance(message["content"], str)]
        return whole + [part["text"] for part in self._parts() if part["type"] == "text"]

    def _parts(self) -> list[dict[str, str]]:
        lists = [message["content"] for message in self.messages if isinstance(message["content"], list)]
        return [part for parts in lists for part in parts]


def has_layout(names: Collection[str]) -> bool:
    """Whether keys, or the columns of a table, are understood."""

    def any_of(keys: tuple[str, ...]) -> bool:
        return any(key in names for key in keys)

    message = "role" in names or "from" in names  # one message of a conversation is no row
    pair = any_of(ASKED) and any_of(ANSWERED)
    return any_of(CHATS) or pair or "chosen" in names or (any_of(PLAIN) and not message)


def is_message(value: object) -> bool:
    """Whether a value is one message of a conversation."""
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def read_row(value: Any, where: str) -> str | Chat | Left:
    """What a row says. Raises UsageError that names the place for what is not understood."""
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, list):
        return _chat(value, None, where)
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a row is {_what(value)}", hint=f"a row has {LAYOUTS}")
    row = {key: held for key, held in value.items() if held is not None}
    if any(_holds(row.get(key)) for key in MEDIA):
        return Left.IMAGES
    return _by_keys(row, value, where)


def _by_keys(row: Mapping[str, Any], value: Mapping[str, Any], where: str) -> str | Chat | Left:
    if not has_layout(row):
        raise _unknown(value, where)
    for key in CHATS:
        if key in row:
            return _chat(_listed(row[key], key, where), row, where)
    asked = next((key for key in ASKED if key in row), None)
    answered = next((key for key in ANSWERED if key in row), None)
    if answered is not None and (asked is not None or not any(key in row for key in PLAIN)):
        return _pair(row, asked, answered, where)
    key = next(key for key in PLAIN if key in row)
    return _plain(_string(row[key], f"{where}: {key!r}"))


def _unknown(value: Mapping[str, Any], where: str) -> UsageError:
    for key in (*CHATS, *PLAIN, *ASKED, *ANSWERED):
        if key in value and value[key] is None:
            return UsageError(f"{where}: {key!r} is null", hint="remove the row, or give it text")
    keys = ", ".join(str(key)[:40] for key in list(value)[:12]) or "none"
    if is_message(value):
        return UsageError(f"{where}: one message of a conversation", hint='write {"messages": [ … ]}, all of them')
    return UsageError(f"{where}: the keys are {keys}; none is understood as text", hint=f"a row has {LAYOUTS}")


def _plain(text: str) -> str | Left:
    return text if text.strip() else Left.EMPTY


def _pair(row: Mapping[str, Any], asked: str | None, answered: str, where: str) -> Chat | Left:
    """An instruction and its answer, each a string or messages; of two answers the chosen one."""
    answer = row[answered]
    if asked is None and not isinstance(answer, list):
        raise UsageError(f"{where}: {answered!r} without a question", hint=f"a row has {LAYOUTS}")
    if isinstance(answer, list) and answer and _role_of(answer[0]) in ("user", "system"):
        return _chat(answer, row, where)  # the whole conversation, its question included
    question = row.get(asked, []) if asked else []
    messages = question if isinstance(question, list) else [{"role": "user", "content": _question(row, asked, where)}]
    if not isinstance(answer, list):
        answer = [{"role": "assistant", "content": _string(answer, f"{where}: {answered!r}")}]
    return _chat([*messages, *answer], row, where)


def _question(row: Mapping[str, Any], asked: str | None, where: str) -> str:
    keys = [key for key in dict.fromkeys((asked, *BESIDE)) if key in row]
    parts = [_string(row[key], f"{where}: {key!r}") for key in keys if key]
    return "\n\n".join(part for part in parts if part.strip())


def _role_of(message: Any) -> str | None:
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return _ROLES.get(role) if isinstance(role, str) else None


def _chat(found: list[Any], row: Mapping[str, Any] | None, where: str) -> Chat | Left:
    messages: list[dict[str, Any]] = []
    for number, value in enumerate(found, 1):
        message = _message(value, f"{where}, message {number}")
        if message is None:
            return Left.IMAGES
        messages.append(message)
    if not any(message["content"] or message.get("tool_calls") for message in messages):
        return Left.EMPTY
    system = next((key for key in SYSTEM if row and _holds(row.get(key))), None)
    if row and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _string(row[system], f"{where}: {system!r}")})
    tools = row.get("tools") if row else None
    return Chat(messages, tools if isinstance(tools, list) and tools else None)


def _message(value: Any, where: str) -> dict[str, Any] | None:
    """A message as templates know it; None for one with an image."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {_what(value)}", hint='a message is {"role": …, "content": …}')
    role, key = value.get("role", value.get("from")), "content" if "content" in value else "value"
    if not isinstance(role, str) or role.lower() not in _ROLES:
        known = ", ".join(sorted(_ROLES))
        raise UsageError(f"{where} has the role {str(role)[:40]}", hint=f"roles that are known: {known}")
    rest = {name: held for name, held in value.items() if name not in ("role", "from", "content", "value", "weight")}
    content = value.get(key)
    if content is None and rest.get("tool_calls"):
        content = ""
    said = _content(content, where)
    return None if said is None else {**rest, "role": _ROLES[role.lower()], "content": said}


def _content(content: Any, where: str) -> str | list[dict[str, str]] | None:
    """The text of a message, of its parts one after another; with images the parts; None where something is no text and
    no image in a file."""
    found: list[dict[str, str]] = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind in _MEDIA_PARTS:
            path = _image_path(part) if kind == "image" else None
            if path is None:
                return None
            found.append({"type": "image", "path": path})
        elif kind not in _TEXT_PARTS:
            raise UsageError(f"{where} has a part of type {str(kind)[:40]}", hint="parts are text or image")
        else:
            text = _string(part.get("text") if isinstance(part, dict) else part, f"{where}: its content")
            found.append({"type": "text", "text": text})
    text = "".join(part.get("text", "") for part in found)
    if _IMAGE_MARK in text:
        return None
    return found if any(part["type"] == "image" for part in found) else text


def _image_path(part: Mapping[str, Any]) -> str | None:
    """Where an image lies, if it is in a file: as transformers' processors take it, an address on the web left out."""
    named = next((part[key] for key in ("path", "image", "url") if part.get(key)), None)
    return named if isinstance(named, str) and "://" not in named and not named.startswith("data:") else None


def _listed(value: Any, key: str, where: str) -> list[Any]:
    """A list, or the JSON of one, as tables hold it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{where}: {key!r} is a string that is not JSON", hint="write a list of messages"
            ) from error
    if not isinstance(value, list):
        raise UsageError(f"{where}: {key!r} is {_what(value)}", hint="write a list of messages")
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where} is {_what(value)}", hint="text is a string")
    return value


def _what(value: Any) -> str:
    kinds = {
        type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
        str: "a string", bytes: "bytes",
    }  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")


def _holds(value: Any) -> bool:
    """Whether a key holds anything: no null, nothing empty, nor an object or a list of such."""
    if isinstance(value, dict):
        return any(_holds(part) for part in value.values())
    if isinstance(value, list | tuple):
        return any(_holds(part) for part in value)
    return value is not None and value != ""

"""The parts of a row of a data set: its conversation, its template, its images, its answer.

ValueError says what is wrong with one; envs/dataset.py says where.
"""
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from support.images import first_value
from support.prompts import MARKER, is_source

SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's words for roles
BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # so PNG, JPEG, GIF and WEBP begin


def conversation(question) -> tuple[list[dict], str | None]:
    """(chat messages up to the last one of the user, what the assistant says after it).

    Of a text, chat messages, or ShareGPT's {"from", "value"}.
    """
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    if not isinstance(question, list) or not question:
        raise ValueError(f"{question!r:.80} is no text, and no list of messages")
    messages, said = [], None
    for message in question:
        if not isinstance(message, Mapping):
            raise ValueError(f"{message!r:.80} is no message")
        if message.get("from") is not None:
            role = SPEAKERS.get(message["from"], message["from"])
            message = {"role": role, "content": message.get("value")}
        messages.append(dict(message))
    if messages[-1].get("role") == "assistant":
        said = joined(messages.pop())
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("the last message, before an answer, must be one of the user")
    if not joined(messages[-1]).replace(MARKER, "").strip():
        raise ValueError("the question is empty")
    return messages, said


def parts_of(message: dict) -> list:
    content = message.get("content")
    return content if isinstance(content, list) else [content]


def joined(message: dict) -> str:
    """The texts of a message."""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts_of(message)]
    return "".join(text for text in texts if isinstance(text, str))


def has_place(message: dict) -> bool:
    """Whether an image belongs somewhere in a message, or is there."""
    return MARKER in joined(message) or any(
        isinstance(part, Mapping) and part.get("text") is None for part in parts_of(message))


def show_first(messages: list[dict], count: int) -> None:
    """Put places for so many images before the text of the first message of the user."""
    first = next(message for message in messages if message.get("role") == "user")
    first["content"] = [{"type": "image"}] * count + parts_of(first)


def around(content, before: str, after: str):
    """The content of a message between two texts."""
    if isinstance(content, str):
        return before + content + after
    texts = [[{"type": "text", "text": text}] if text else [] for text in (before, after)]
    return texts[0] + list(content) + texts[1]


def fill(template: str, row: Mapping, hidden: Sequence[str]) -> str:
    """A part of the template, with the columns that it names; ValueError for the hidden ones."""
    def column_text(match: re.Match) -> str:
        name = match[1]
        if name not in row or name in hidden:
            raise ValueError(f"{{{name}}} must name a column of the row that is not the answer")
        if isinstance(row[name], list):
            lettered = zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", row[name])
            return "\n".join(f"{letter}. {as_text(entry)}" for letter, entry in lettered)
        return as_text(row[name])

    return re.sub(r"\{(\w+)\}", column_text, template)


def as_text(value) -> str:
    """A text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def checked_answer(answer):
    """A text; lists and tables, for JSON and rewards of one's own, stay as they are."""
    if not is_source(answer) or isinstance(answer, str) and not answer.strip():
        raise ValueError("there is no answer")
    return answer if isinstance(answer, (list, Mapping)) else as_text(answer)


def image_parts(prompt: list[dict], place: str) -> list[tuple[dict, str]]:
    """(each image part of a prompt, its place for messages)."""
    found = []
    for message in prompt:
        for part in parts_of(message):
            if isinstance(part, Mapping) and part["type"] != "text":
                found.append((part, f"{place}, image {len(found)}"))
    return found


def located(source, folder: Path):
    """An image as load_image takes it; ValueError if it is none, or its file is not there."""
    if isinstance(source, Mapping):
        source = first_value(source, ("url", "bytes", "path"))
    if isinstance(source, (bytes, Image.Image)):
        return source
    if not isinstance(source, str):
        raise ValueError(f"{source!r:.80} is no image")
    if source.startswith("data:") or "://" in source:
        return source
    if source.startswith(BASE64):
        return f"data:;base64,{source}"
    path = folder / Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return str(path)

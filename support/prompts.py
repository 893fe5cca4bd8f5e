"""A row of a data set -> its conversation in one form, or a ValueError that says what is wrong.

Data sets hold conversations in many forms: one schema for all parts, so that most keys are None;
arrays and tuples instead of lists; pictures in a column of their own. What comes out of here has
text in "text" and a source in every image part. The pictures that the model is shown are then as
many as those of the row, and stand where they are meant to: a policy that is asked about an image
and sees none trains as if all were well.
"""
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy

SOURCES = ("image", "image_url", "url", "path")  # the keys under which a part holds its image
MARKER = "<image>"                               # in a text, where an image of the column belongs


def row_prompt(row: Mapping, reserved: Sequence[str] = ()) -> list[dict]:
    """The row's prompt as clean_prompt makes it, with the images of a column in their places.

    A place is an image part without an image, or <image> in a text.
    """
    if row.get("prompt") is None:
        raise ValueError("the row has no 'prompt'")
    if column(row, "videos"):
        raise ValueError("the row has a column `videos`, but videos are not shown to the model")
    return clean_prompt(row["prompt"], column_images(row), reserved)


def clean_prompt(prompt, images: Sequence = (), reserved: Sequence[str] = ()) -> list[dict]:
    """Chat messages, each {"role", "content": a text, or a list of parts, ...} without Nones.

    A part is {"type": "text", "text"}, or {"type": "image" or "image_url", the same: a source}.
    The images fill the places that have none. No text may hold one of the reserved strings: a
    tokenizer makes of them what stands for an image, and no image belongs there.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    filler = Filler(images)
    messages = []
    for number, message in enumerate(as_list(prompt, "the prompt")):
        place = f"message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{place} has no role: {message!r:.200}")
        message = without_nones(message)
        if column_images(message):
            raise ValueError(f"{place} has images beside its content, where they are not shown: "
                             'each needs a part {"type": "image", "image": ...}')
        content = clean_content(message.get("content"), filler, place)
        message = {**message, "content": content}
        check_reserved(message, reserved, place)
        messages.append(message)
    if not messages:
        raise ValueError("the prompt is empty")
    filler.check_used()
    return messages


class Filler:
    """Hands out the images of a row's column, one for each place, and notices what does not fit."""

    def __init__(self, images: Sequence):
        self.images = list(images)
        self.places = 0  # that need an image of the column
        self.own = 0     # images that the prompt has by itself

    def next_part(self, place: str) -> dict:
        self.places += 1
        if self.places > len(self.images):
            raise ValueError(f"{place}: cannot read image number {self.places}: the prompt has a "
                             f"place for it, but the columns `images` and `image` of the row have "
                             f"{len(self.images)} images")
        return {"type": "image", "image": self.images[self.places - 1]}

    def check_used(self) -> None:
        """A column may hold once more what the parts have themselves, but nothing else."""
        have = self.places or self.own
        if self.images and have != len(self.images):
            raise ValueError(
                f"the row has {len(self.images)} images in a column, but its prompt shows {have}: "
                f'each needs a part {{"type": "image"}}, or {MARKER} in the text')


def clean_content(content, filler: Filler, place: str) -> str | list[dict]:
    if isinstance(content, str) and MARKER not in content:
        return content
    if isinstance(content, (str, Mapping)):
        content = [content]
    parts = []
    for number, part in enumerate(as_list(content, f"{place}: content")):
        parts += clean_part(part, filler, f"{place}, part {number}")
    if not parts:
        raise ValueError(f"{place}: content is empty")
    return parts


def clean_part(part, filler: Filler, place: str) -> list[dict]:
    """The part in one form. A text with markers becomes several, with the images between them."""
    if isinstance(part, str):
        part = {"text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"{place} is a {type(part).__name__}, not a text or image part")
    part = without_nones(part)
    kind = part.get("type")
    keys = [kind, *SOURCES] if kind in SOURCES else SOURCES  # the one that the type names is first
    sources = [part[key] for key in keys if is_source(part.get(key))]
    if kind is None and sources:
        kind = "image"
    elif kind is None and "text" in part:
        kind = "text"
    if kind not in ("text", "image", "image_url"):
        raise ValueError(f"{place} is of type {kind!r}, not text or image: {part!r:.200}")
    if sources if kind == "text" else part.get("text"):
        raise ValueError(f"{place} is of type {kind!r}, but a text and an image are two parts: "
                         f"{part!r:.200}")
    if kind == "text":
        return text_parts(part.get("text"), filler, place)
    if not sources:
        return [filler.next_part(place)]
    filler.own += 1
    return [{"type": kind, kind: sources[0]}]


def text_parts(text, filler: Filler, place: str) -> list[dict]:
    if not isinstance(text, str):
        raise ValueError(f"{place} is a text part whose text is {text!r:.200}")
    first, *others = text.split(MARKER)
    parts = [first]
    for other in others:
        parts += [filler.next_part(place), other]
    if others:
        parts = [part for part in parts if part != ""]
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def is_source(value) -> bool:
    """Whether there is an image, and not only a place for one.

    One schema for all rows leaves {"bytes": None, "path": None} there, pandas leaves NaN.
    """
    if isinstance(value, Mapping):
        return any(inner is not None for inner in value.values())
    if isinstance(value, (str, bytes)):
        return len(value) > 0
    if isinstance(value, float):
        return not math.isnan(value)
    return value is not None


def column_images(row: Mapping) -> list:
    """The images that stand in a column of the row, `images` or `image`."""
    images, image = column(row, "images"), column(row, "image")
    if images and image:
        raise ValueError("the row has images in both of the columns `images` and `image`: keep one")
    return images or image


def column(row: Mapping, name: str) -> list:
    """What stands in a column; Nones fill up a table and are left out."""
    values = row.get(name)
    if isinstance(values, numpy.ndarray) and values.dtype != object and values.ndim < 4:
        values = [values]  # one picture, not a list of them
    if not isinstance(values, (list, tuple, numpy.ndarray)):
        values = [values]
    return [value for value in values if is_source(value)]


def check_reserved(message: dict, reserved: Sequence[str], place: str) -> None:
    texts = [str(value) for key, value in message.items() if key != "content"]
    if isinstance(message["content"], str):
        texts.append(message["content"])
    else:  # templates join neighbouring texts
        texts.append("".join(part.get("text", " ") for part in message["content"]))
    for string in reserved:
        if any(string in text for text in texts):
            raise ValueError(f"{place} quotes {string!r}, which the model reads as an image or "
                             "video that is not there")


def without_nones(table: Mapping) -> dict:
    return {key: value for key, value in table.items() if value is not None}


def as_list(values, what: str) -> list:
    if isinstance(values, (list, tuple)) or getattr(values, "ndim", 0) > 0:
        return list(values)
    raise ValueError(f"{what} is {values!r:.200}, not a list")


def reserved_strings(tokenizer, token_ids: Sequence[int] = (), processor=None) -> list[str]:
    """The strings that a model's tokenizer or processor takes for images and videos.

    Those of the ids that its config names, and those that the processor itself looks for.
    """
    found = set(tokenizer.convert_ids_to_tokens(list(token_ids)))
    if processor is not None:
        for name, value in vars(processor).items():
            about_images = any(word in name for word in ("image", "video", "audio", "boi", "eoi"))
            if name.endswith("_token") and about_images and isinstance(value, str):
                found.add(value)
    return sorted(found - {None, ""})


def processor_options(server_args: Mapping) -> dict:
    """The server's mm_processor_kwargs, pixel limits for example, which the trainer's gets, too."""
    return as_table(server_args, "mm_processor_kwargs")


def template_options(server_args: Mapping) -> dict:
    """What the chat template is told, enable_thinking for example; every request says it, too."""
    return (as_table(server_args, "default_chat_template_kwargs")
            | as_table(server_args, "chat_template_kwargs"))


def as_table(server_args: Mapping, name: str) -> dict:
    """A flag's table, which may be written as on vLLM's command line, as JSON."""
    table = server_args.get(name)
    try:
        if isinstance(table, str):
            table = json.loads(table)
        return dict(table or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a table, or one in JSON, not {table!r:.200}") from error


def server_template(server_args: Mapping) -> str | None:
    """The chat template that the server is told to use, by a file or as it is, if it is."""
    template = server_args.get("chat_template")
    if template and "{" not in template:
        template = Path(template).read_text()
    return template

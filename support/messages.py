"""Prompts in the form in which the OpenAI endpoint takes them, with their images."""
import hashlib

from PIL import Image

from support.images import load_image, png_data_uri
from support.prompts import clean_prompt


class ConversationOver(Exception):
    """Nothing more can be said: the turns or the context are used up."""


def render_prompt(prompt: list[dict]) -> tuple[list[dict], list[Image.Image]]:
    """Chat messages -> (the same in OpenAI form with PNG data URIs, the images in order)."""
    messages, images = [], []
    for message in clean_prompt(prompt):
        if not isinstance(message["content"], str):
            message["content"] = [render_part(part, images) for part in message["content"]]
        messages.append(message)
    return messages, images


def render_part(part: dict, images: list[Image.Image]) -> dict:
    """The part in OpenAI form. Its image, if it has one, is added to the images.

    vLLM keeps what it made of an image under the "uuid".
    """
    if part["type"] == "text":
        return part
    images.append(load_image(part[part["type"]]))
    url = png_data_uri(images[-1])
    name = hashlib.sha256(url.encode()).hexdigest()
    return {"type": "image_url", "image_url": {"url": url}, "uuid": name}


def image_parts(messages: list[dict]) -> list[dict]:
    """Of messages in OpenAI form, as vLLM's route for token ids takes them."""
    return [{"type": "image_url", "url": part["image_url"]["url"], "uuid": part["uuid"]}
            for message in messages if not isinstance(message["content"], str)
            for part in message["content"] if part["type"] == "image_url"]

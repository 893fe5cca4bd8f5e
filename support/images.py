"""Images as environments give them -> RGB pixels, within limits of time and size."""
import base64
import io
import time

import requests
from PIL import Image, ImageOps

SECONDS, BYTES = 20, 2**26  # at most, for the download of an image


def load_image(source) -> Image.Image:
    """RGB pixels of a PIL image, path, URL, data URI, bytes, or a dict that holds one of these.

    ValueError says what cannot be read. Refused are animations (which frame is meant?), modes
    without a known range of values, and images of more than Image.MAX_IMAGE_PIXELS.
    """
    try:
        image = open_image(source)
        animated = getattr(image, "is_animated", False) and image.format != "MPO"  # of phones
        too_large = image.width * image.height > Image.MAX_IMAGE_PIXELS
        if animated or too_large or image.mode in ("I", "F"):
            raise ValueError(f"{image.size} pixels, mode {image.mode}, animated: {animated}")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip it to white
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        white = Image.new("RGBA", image.size, "white")  # as vLLM does with transparency
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise ValueError(f"cannot read image {str(source)[:80]!r}: {error}") from error


def open_image(source) -> Image.Image:
    """The image behind a source, not yet decoded."""
    if isinstance(source, dict):  # OpenAI's, or of Hugging Face datasets, undecoded
        source = source.get("url") or source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        source = base64.b64decode(source.split(",", 1)[1])
    elif isinstance(source, str) and "://" in source:
        source = download(source)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    return Image.open(source)


def download(url: str) -> bytes:
    """The body of a URL, http or https alone; ValueError if it is too large or too slow."""
    deadline, body = time.monotonic() + SECONDS, b""
    with requests.get(url, timeout=SECONDS, stream=True) as response:
        response.raise_for_status()
        while True:
            piece = response.raw.read1(2**16, decode_content=True)
            if not piece:
                return body
            body += piece
            if len(body) > BYTES or time.monotonic() > deadline:
                raise ValueError(f"more than {BYTES} bytes or {SECONDS} seconds")


def png_data_uri(image: Image.Image) -> str:
    """The image as a URI. PNG loses nothing, so that trainer and server see the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

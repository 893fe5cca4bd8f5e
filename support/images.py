"""Images as environments give them -> RGB pixels of our own, within limits of time and size."""
import base64
import contextlib
import io
import ipaddress
import os
import socket
import stat
import threading
import time
from pathlib import Path
from urllib.parse import urljoin

import numpy
import requests
from PIL import Image, ImageOps
from urllib3.util import parse_url

SECONDS, BYTES = 20, 2**26  # at most, for the download of an image
FILE_BYTES = 2**28          # at most, of an image file
PIXELS = 2**25              # at most, of an image: decoded it takes 4 bytes for each
LARGE = 2**24               # pixels from which on one image at a time is decoded
# Those that Pillow reads by itself, and only as large as their header says: icons hold another
# file of another size, and for EPS it runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
REDIRECTS = 5
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")  # all other ranges are local, or lead to IPv4
USERS_OBJECT = threading.RLock()  # rows share images, and each row is read by a thread of its own
LARGE_IMAGE = threading.Lock()


def load_image(source) -> Image.Image:
    """RGB pixels of a PIL image, array, path, URL, data URI, bytes, file, or a dict with one.

    They are a copy: the source stays as it is. ValueError says what cannot be read. Refused are
    animations (which frame is meant?), modes without a known range of values, and images of more
    than PIXELS.
    """
    try:
        image = open_image(source)
        pixels = image.width * image.height
        if is_animated(image) or pixels > PIXELS or image.mode in ("I", "F"):
            raise ValueError(f"{image.size} pixels, at most {PIXELS} in all, mode {image.mode}, "
                             f"animated: {is_animated(image)}")
        with LARGE_IMAGE if pixels > LARGE else contextlib.nullcontext():
            return rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise ValueError(f"cannot read image {str(source)[:80]!r}: {error}") from error


def is_animated(image: Image.Image) -> bool:
    return getattr(image, "is_animated", False) and image.format != "MPO"  # those are of phones


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; what is transparent shows white, as in vLLM."""
    if image.mode.startswith("I;16"):  # Pillow would clip it to white
        return image.convert("I").point(lambda value: value / 257).convert("L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def open_image(source) -> Image.Image:
    """The image behind a source, as an object that no other thread has."""
    if isinstance(source, dict):  # OpenAI's, or of Hugging Face datasets, undecoded
        source = first_value(source, ("url", "bytes", "path"))
    if isinstance(source, Image.Image):
        return own_image(source)
    if isinstance(source, numpy.ndarray) and source.ndim > 1:
        return Image.fromarray(source.copy())
    return open_bytes(read_bytes(source))


def open_bytes(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=FORMATS)


def first_value(source: dict, keys: tuple[str, ...]):
    """The first of these that is there; in tables of one schema all keys are, most of them None."""
    for key in keys:
        if source.get(key) is not None:
            return source[key]
    raise ValueError(f"it has none of {', '.join(keys)}")


def read_bytes(source) -> bytes:
    """An image file's content, from a path, URL, data URI, open file, or the bytes themselves."""
    if isinstance(source, str) and source.startswith("data:"):
        return base64.b64decode(source.split(",", 1)[1])
    if isinstance(source, str) and "://" in source:
        return download(source)
    if isinstance(source, (str, os.PathLike)):
        check_regular(os.stat(source))
        return Path(source).read_bytes()
    if isinstance(source, numpy.ndarray) and source.dtype == numpy.uint8:
        return source.tobytes()
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if hasattr(source, "read"):
        return read_file(source)
    raise ValueError(f"a {type(source).__name__} is no image, path, URL, bytes or file")


def read_file(file) -> bytes:
    """All of an open file, whose position stays where it is."""
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        state = os.fstat(file.fileno())
        check_regular(state)
        return os.pread(file.fileno(), state.st_size, 0)
    with USERS_OBJECT:
        position = file.tell()
        file.seek(0)
        content = file.read()
        file.seek(position)
    return content


def check_regular(state: os.stat_result) -> None:
    """ValueError for what may be waited for or read for ever: pipes, devices, files of /proc."""
    if not stat.S_ISREG(state.st_mode) or not 0 < state.st_size <= FILE_BYTES:
        raise ValueError(f"it is no regular file of 1 to {FILE_BYTES} bytes")


def own_image(image: Image.Image) -> Image.Image:
    """The user's image as an object of our own.

    Image.open reads no pixels, and two threads that later decode one object leave wrong ones in it
    for good. So what is not yet decoded is opened again from its file, and the user's object is
    not touched.
    """
    if getattr(image, "fp", None) is None:  # nothing of it is left to decode, it is only read
        return still_copy(image)
    with USERS_OBJECT:
        if getattr(image, "_im", None) is None:
            own = open_bytes(read_file(image.fp))
            own.seek(image.tell())
            if (own.size, own.mode) != (image.size, image.mode):
                own.draft(image.mode, image.size)  # as the user has said, of a JPEG
            if (own.size, own.mode) == (image.size, image.mode):
                return own
        return still_copy(image)


def still_copy(image: Image.Image) -> Image.Image:
    """A copy; ValueError for an animation, of which it would show one picture."""
    if is_animated(image):
        raise ValueError("it is animated")
    return image.copy()


def without_shared_images(value):
    """A row, or a value in one, whose PIL images are objects that no other thread has."""
    if isinstance(value, Image.Image):
        with contextlib.suppress(ValueError):  # of an animation, which the model is not shown
            value = own_image(value)
        return value
    if isinstance(value, dict):
        return {key: without_shared_images(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_shared_images(entry) for entry in value]
    return value


def no_credentials(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """A way to sign requests that signs none; else requests would look into ~/.netrc."""
    return request


def download(url: str) -> bytes:
    """The body of a URL, http or https alone; ValueError if it is too large or too slow.

    A redirect must not lead into this machine or its private network: whoever wrote the URL, it is
    another one who chose where it leads.
    """
    deadline = time.monotonic() + SECONDS
    for _ in range(REDIRECTS):
        with requests.get(url, timeout=SECONDS, stream=True, allow_redirects=False,
                          auth=no_credentials) as response:
            response.raise_for_status()
            if not response.is_redirect:
                return read_body(response, deadline)
            url = urljoin(url, response.headers["location"])
        check_public(url)
    raise ValueError(f"more than {REDIRECTS} redirects")


def read_body(response: requests.Response, deadline: float) -> bytes:
    body = bytearray()
    while True:
        piece = response.raw.read1(2**16, decode_content=True)
        if not piece:
            return bytes(body)
        body += piece
        if len(body) > BYTES or time.monotonic() > deadline:
            raise ValueError(f"more than {BYTES} bytes or {SECONDS} seconds")


def check_public(url: str) -> None:
    """ValueError if the host of a URL is, by name or number, not out in the internet."""
    parts = parse_url(url)  # as requests does: of "http://a\\@b" the host is a, not b
    host = (parts.host or "localhost").strip("[]")
    try:
        found = socket.getaddrinfo(host, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError:
        return  # only a proxy knows this name, and so the proxy's network is what it can reach
    for *_, address in found:
        ip = ipaddress.ip_address(address[0].split("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        tunnel = ip.version == 6 and (ip not in GLOBAL_IPV6 or ip.sixtofour)
        if tunnel or not ip.is_global or ip.is_multicast:
            raise ValueError(f"it redirects to {url}, which is not a public address")


def png_data_uri(image: Image.Image) -> str:
    """The image as a URI. PNG loses nothing, so that trainer and server see the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

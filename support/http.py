"""Calls to the vLLM server, tried again where that helps."""
import threading
import time
from collections.abc import Sequence

import requests

THREAD = threading.local()  # .session: one requests.Session per thread


class ServerError(RuntimeError):
    """The server is gone, hangs or broke off: bring it back, send it the weights, try again."""


def call(url: str, body: dict | None = None, method: str = "post", *, timeout: float,
         pauses: Sequence[float] = (0.5, 1, 2, 4)) -> dict:
    """What the server answers. ServerError without a connection, RuntimeError with a bad answer.

    After each pause it is tried again: the server is busy, or has closed an idle connection.
    """
    if not hasattr(THREAD, "session"):
        THREAD.session = requests.Session()
        THREAD.session.trust_env = False  # a proxy of the site would not reach the server
    for pause in (*pauses, None):
        try:
            response = THREAD.session.request(method, url, json=body, timeout=timeout)
            if response.ok:
                return response.json() if response.content else {}
            if pause is None or response.status_code < 500:
                raise RuntimeError(f"{url}: {response.status_code} {response.text[:500]}")
        except requests.ConnectionError as error:
            if pause is None or isinstance(error, requests.Timeout):
                raise ServerError(f"no connection to {url}: {error}") from error
        time.sleep(pause)


def is_healthy(url: str) -> bool:
    """Whether a server answers there."""
    try:
        call(f"{url}/health", method="get", timeout=5, pauses=(0.2,))
        return True
    except (RuntimeError, requests.RequestException):
        return False

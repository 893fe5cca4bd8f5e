"""Calls to the vLLM server, tried again where that helps."""
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import requests

from support import secret
from support.task import Task
from support.text import plain

NO_JSON = "Out of range float values"  # how vLLM says that there are NaN in an answer
SPOILED = set()  # addresses of servers that said so: there are NaN in their caches, too
THREAD = threading.local()  # .session: one requests.Session per thread


class ServerError(RuntimeError):
    """The server is gone, hangs or broke off: bring it back, send it the weights, try again."""


class Refusal(RuntimeError):
    """The server's answer is no success, or no JSON; `status` is that of HTTP."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def call(url: str, body: dict | None = None, method: str = "post", *, timeout: float,
         pauses: Sequence[float] = (0.5, 1, 2, 4)) -> dict:
    """What the server answers. ServerError without a connection, Refusal with a bad answer.

    After each pause it is tried again: the server is busy, or has closed an idle connection.
    """
    for pause in (*pauses, None):
        try:
            response = session().request(method, url, json=body, timeout=timeout,
                                         headers=secret.headers(url), allow_redirects=False)
            if response.status_code < 300:
                return read_json(response)
            if pause is None or response.status_code < 500:
                raise Refusal(describe(response), response.status_code)
        except requests.ConnectionError as error:
            if pause is None or isinstance(error, requests.Timeout):
                raise ServerError(f"no connection to {url}: {plain(str(error))}") from error
        time.sleep(pause)


def session() -> requests.Session:
    """That of this thread."""
    if not hasattr(THREAD, "session"):
        THREAD.session = requests.Session()
        THREAD.session.trust_env = False  # a proxy of the site would not reach the server
    return THREAD.session


def read_json(response: requests.Response) -> dict:
    """The body of a success; {} if there is none."""
    try:
        said = response.json() if response.content else {}
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise Refusal(describe(response), response.status_code)
    return said


def describe(response: requests.Response) -> str:
    """An answer that is of no use, in one line, and what helps if it asks who we are."""
    said = plain(response.text[:2000])[:500] or plain(response.reason or "") or "no text"
    message = f"{response.url}: {response.status_code} {said}"
    if NO_JSON in said:
        SPOILED.add(urlsplit(response.url).netloc)
        message = (f"{response.url}: its logprobs are not finite, because its weights have "
                   "exploded; lower learning_rate")
    if response.status_code in (401, 403):
        message += (f". Set {secret.VARIABLE} or bring {secret.secret_file(response.url)} (the "
                    "secret of a server that sync.py or train.py started), or VLLM_API_KEY")
    return message


def was_spoiled(url: str) -> bool:
    """Whether this server's logprobs were not finite since this was last asked."""
    address = urlsplit(url).netloc
    spoiled = address in SPOILED
    SPOILED.discard(address)
    return spoiled


def is_healthy(url: str) -> bool:
    """Whether a server answers there."""
    return succeeds(f"{url}/health")


def is_open(url: str) -> bool:
    """Whether the server's RL routes answer a caller without any secret."""
    return succeeds(f"{url}/weight_info")


def succeeds(url: str) -> bool:
    """Whether this is answered with a 200 within 5 seconds, whoever asks."""
    try:
        asking = Task(lambda: session().get(url, timeout=5, allow_redirects=False, stream=True))
        return asking.result(5, "answer").status_code == 200
    except OSError:  # as all of requests' own errors are
        return False

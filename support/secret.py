"""The secret of a server that we start: without it the server answers nothing but /health.

vLLM's RL routes let a caller replace weights and run code, and any user and any browser page of the
machine reaches them. So a server that we start is told a secret, by its environment, and every
request of ours carries it in a header. It stands in no command line and in no log.

Whoever else shall use the server is told by the variable VLM_SERVER_SECRET, or finds the secret in
the file that `secret_file` names, which its owner alone can read.
"""
import contextlib
import hmac
import os
import re
import secrets
import socket
from pathlib import Path
from urllib.parse import urlsplit

VARIABLE = "VLM_SERVER_SECRET"
HEADER = "X-VLM-Server-Secret"
OPEN_ROUTE = "/health"  # which tells nothing but that a server is up
MADE = {}               # {address: secret} of the servers that this process started


def address(url: str) -> str:
    """HOST-PORT of a server. A loopback address is that of this machine, by its name."""
    parts = urlsplit(url)
    host = parts.hostname
    if host in ("127.0.0.1", "localhost"):
        host = socket.gethostname()
    return f"{host}-{parts.port}"


def secret_file(url: str) -> Path:
    """Where the secret of the server at this URL is kept for its owner's other processes."""
    return Path(os.path.expanduser("~"), ".cache", "vlm-servers", f"{address(url)}.secret")


def variable(name: str) -> str:
    """The value of an environment variable, or ""; ValueError if no header can carry it."""
    value = os.environ.get(name, "").strip()
    if not re.fullmatch("[!-~]*", value):
        raise ValueError(f"{name} must be of printable ASCII characters, without spaces")
    return value


def make(url: str) -> str:
    """A new secret for the server that is about to start, or that of the environment; kept."""
    secret = variable(VARIABLE) or secrets.token_urlsafe(32)
    MADE[address(url)] = secret
    with contextlib.suppress(OSError):  # no home: this process alone will know it
        path = secret_file(url)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_suffix(f".{secrets.token_hex(4)}")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret)
        partial.rename(path)
    return secret


def forget(url: str) -> None:
    """Remove the secret of a server of ours that has ended."""
    secret = MADE.pop(address(url), None)
    with contextlib.suppress(OSError):
        path = secret_file(url)
        if path.read_text() == secret:  # else it is that of a server that came after ours
            path.unlink()


def known(url: str) -> str | None:
    """The secret of the server at this URL, read anew: the server may have been started again."""
    secret = variable(VARIABLE) or MADE.get(address(url))
    if secret:
        return secret
    with contextlib.suppress(OSError):
        return secret_file(url).read_text().strip()
    return None


def headers(url: str) -> dict[str, str]:
    """What a request to the server at this URL must carry: its secret, and vLLM's own API key."""
    found = {}
    secret, key = known(url), variable("VLLM_API_KEY")
    if secret:
        found[HEADER] = secret
    if key:
        found["Authorization"] = f"Bearer {key}"
    return found


class AskSecret:
    """ASGI middleware (vLLM's --middleware): 401 without the secret, on every route but /health."""

    def __init__(self, app):
        self.app = app
        self.secret = variable(VARIABLE).encode()
        if not self.secret:
            raise ValueError(f"{VARIABLE} is not set: there is no secret to ask for")

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan" or self.may_pass(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            text = f"this server asks for its secret in the header {HEADER}".encode()
            await send({"type": "http.response.start", "status": 401,
                        "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": text})

    def may_pass(self, scope) -> bool:
        route = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and route == OPEN_ROUTE:
            return True
        given = dict(scope["headers"]).get(HEADER.lower().encode(), b"")
        return hmac.compare_digest(given, self.secret)

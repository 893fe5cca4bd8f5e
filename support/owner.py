"""One trainer sends weights to a server at a time, and a second one is told the name of the first.

vLLM keeps one string for whoever updates its weights, the weight_version. Ours says which step of
which trainer the weights are, and a port at which that trainer answers as long as it lives: however
a process ends, its port ends with it. So no server is left locked, and no heartbeat is needed.
"""
import contextlib
import os
import re
import secrets
import socket
import threading

from support.text import plain

VERSION = re.compile(r"(?P<step>\S+) by (?P<name>.*) \[(?P<host>.*):(?P<port>\d+) (?P<token>\w+)\]")
TOKENS = set()  # of this process, in which a new trainer may follow upon an old one
SECONDS = 5     # to wait for an owner's answer


class Owner:
    """A trainer, as the weight_version of its server names it."""

    def __init__(self, run_name: str, address: str):
        """address: one of this machine that can be reached from where the server can."""
        self.token = secrets.token_hex(8)
        TOKENS.add(self.token)
        self.listener = socket.create_server((address, 0))
        self.name = plain(f"run {run_name!r}, process {os.getpid()} on {socket.gethostname()}")
        self.place = f"{address}:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.answer, daemon=True).start()

    def version(self, step: int | None) -> str:
        """The weight_version of weights of this step; None: nothing was sent yet."""
        return f"{step} by {self.name} [{self.place} {self.token}]"

    def answer(self) -> None:
        """Say the token to whoever asks, until the listener is closed."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(self.token.encode())

    def close(self) -> None:
        """This trainer owns its server no longer."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # else accept() would wait for one more
        self.listener.close()


def other_owner(version: str) -> str | None:
    """The name of the trainer of another process that sent these weights, if it still lives."""
    match = VERSION.fullmatch(version)
    if match is None or match["token"] in TOKENS:
        return None
    try:
        with socket.create_connection((match["host"], int(match["port"])), SECONDS) as connection:
            connection.sendall(b"who is there?\r\n\r\n")
            said = connection.recv(100).decode(errors="replace")
    except TimeoutError:
        return plain(match["name"])  # it lives, but is stopped, or busy
    except (OSError, OverflowError):
        return None
    return plain(match["name"]) if said == match["token"] else None

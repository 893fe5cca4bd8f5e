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
import time

from support import other_server
from support.http import ServerError
from support.text import plain

VERSION = re.compile(r"(?P<step>\S+) by (?P<name>.*) \[(?P<host>.*):(?P<port>\d+) (?P<token>\w+)\]")
TOKENS = set()  # of this process, in which a new trainer may follow upon an old one
LOOPBACK = "127.0.0.1"
SECONDS = 5     # to wait for an owner's answer
MOMENT = 0.3    # in which a trainer that came at the same instant has read and written, too


def step_of(version: str) -> int | None:
    """The step whose weights a weight_version of ours stands for."""
    match = VERSION.fullmatch(version)
    return int(match["step"]) if match and match["step"].isdigit() else None


class Lease:
    """A trainer's right to its server (sync.Server), while the server names it as its owner."""

    def __init__(self, server):
        self.server, self.config = server, server.config
        self.listener = None  # while we own the server
        self.token = secrets.token_hex(8)
        self.name = plain(f"run {self.config.run_name!r}, process {os.getpid()} on "
                          + socket.gethostname())
        TOKENS.add(self.token)

    def claim(self) -> None:
        """Become the server's owner, if we are not yet.

        ValueError if the server is none for this run, or if another trainer that lives owns it. A
        plain vLLM that never gets any weights cannot have an owner.
        """
        if self.listener:
            return
        if not self.server.ours and not other_server.compare(self.config):
            return
        listener = socket.create_server((self.server.own_address(), 0))
        self.place = "{}:{}".format(*listener.getsockname()[:2])
        self.server.version = None  # whatever it was sent before, somebody else may have been there
        self.refuse_other()
        self.write(None)
        time.sleep(MOMENT)
        self.refuse_other()
        self.listener = listener
        os.register_at_fork(after_in_child=listener.close)  # a child may outlive us
        threading.Thread(target=answer, args=(listener, self.token), daemon=True).start()

    def refuse_other(self) -> None:
        """ValueError if another trainer that lives owns the server."""
        other = self.living_owner(self.served())
        if other:
            raise ValueError(f"the server at {self.server.url} is in use by {other}: wait for its "
                             "end, start the server again, or set another vllm_server_port")

    def version(self, step: int | None) -> str:
        """The weight_version of our weights after this step; None: they are not all there."""
        return f"{step} by {self.name} [{self.place} {self.token}]"

    def write(self, step: int | None) -> None:
        """Let the server say that it has these weights."""
        self.ask("update_weight_version", {"new_version": self.version(step)})

    def served(self) -> str:
        """The server's weight_version."""
        return str(self.ask("weight_info", method="get").get("weight_version"))

    def ask(self, route: str, body: dict | None = None, method: str = "post") -> dict:
        """What the server answers; ServerError if it does not, as when its engine has died."""
        try:
            return self.server.call(route, body, method)
        except (OSError, RuntimeError) as error:
            raise ServerError(f"{self.server.url} does not answer: {error}") from error

    def check(self) -> None:
        """Raise unless the server has the weights that we sent last, and nobody else's.

        ServerError if they are lost, because somebody restarted it; RuntimeError if another trainer
        has sent its own.
        """
        if self.listener is None:
            return
        served, step, url = self.served(), self.server.version, self.server.url
        if served == self.version(step):
            return
        other = self.living_owner(served)
        if other:
            raise RuntimeError(f"{url} was taken by {other}: one trainer at a time can use a "
                               "server, set another vllm_server_port")
        raise ServerError(f"{url} has weights {plain(served)!r}, not those of step {step}, which "
                          "it was sent: it was started again, or taken by another trainer")

    def living_owner(self, version: str) -> str | None:
        """The name of the trainer of another process that sent these weights, if it may live."""
        match = VERSION.fullmatch(version)
        if match is None or match["token"] in TOKENS:
            return None
        name = plain(match["name"])
        if match["host"] == LOOPBACK != self.server.own_address():
            return name  # it is on the server's machine, and cannot be asked from here
        try:
            with socket.create_connection((match["host"], int(match["port"])), SECONDS) as asked:
                asked.sendall(b"who is there?\r\n\r\n")
                said = asked.recv(100).decode(errors="replace")
        except (ConnectionError, OverflowError):
            return None  # nobody is at that port
        except OSError:
            return name  # it is stopped, or busy, or its network is out of order
        return name if said == match["token"] else None

    def release(self) -> None:
        """Own the server no longer."""
        if self.listener:
            with contextlib.suppress(OSError):
                self.listener.shutdown(socket.SHUT_RDWR)  # else accept() would wait for one more
            self.listener.close()
            self.listener = None


def answer(listener: socket.socket, token: str) -> None:
    """Say the token to whoever asks, until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.sendall(token.encode())

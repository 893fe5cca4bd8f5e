"""A limit of time for what others wrote, or serve."""
import threading
import time
from collections.abc import Callable


class Task:
    """action() in a thread of its own: one that never returns takes no thread of a pool with it."""

    def __init__(self, action: Callable):
        self.start, self.value, self.error = time.monotonic(), None, None
        self.thread = threading.Thread(target=self.run, args=(action,), daemon=True)
        self.thread.start()

    def run(self, action: Callable) -> None:
        try:
            self.value = action()
        except Exception as error:
            self.error = error
        except BaseException as error:  # SystemExit in here ends this thread, not who waits for it
            self.error = RuntimeError(f"{type(error).__name__}: {error}")

    def result(self, seconds: float, what: str, hint: str = ""):
        """Its value or exception; TimeoutError if there is none so many seconds after its start."""
        self.thread.join(max(0.0, self.start + seconds - time.monotonic()))
        if self.thread.is_alive():
            raise TimeoutError(f"no {what} in {seconds:g} s {hint}")
        if self.error is not None:
            raise self.error
        return self.value

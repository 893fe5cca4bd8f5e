"""Threads: a limit of time for what others wrote, or serve; and those that encode pictures."""
import atexit
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool

import torch

CURRENT = threading.local()  # .task: that of this thread


class Task:
    """action() in a thread of its own: one that never returns takes no thread of a pool with it."""

    def __init__(self, action: Callable):
        self.since, self.value, self.error = time.monotonic(), None, None
        self.thread = threading.Thread(target=self.run, args=(action,), daemon=True)
        self.thread.start()

    def run(self, action: Callable) -> None:
        CURRENT.task = self
        try:
            self.value = action()
        except Exception as error:
            self.error = error
        except BaseException as error:  # SystemExit in here ends this thread, not who waits for it
            self.error = RuntimeError(f"{type(error).__name__}: {error}")

    def result(self, seconds: float, what: str, hint: str = ""):
        """Its value or exception; TimeoutError if there is none so many seconds after `since`.

        That is its start, or the end of what it did without_limit.
        """
        while self.thread.is_alive():
            left = self.since + seconds - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no {what} in {seconds:g} s {hint}")
            self.thread.join(min(left, 1))  # for `since` may change meanwhile
        if self.error is not None:
            raise self.error
        return self.value


@contextlib.contextmanager
def without_limit():
    """For what has a limit of its own: the time of the task of this thread begins again after it."""
    task = getattr(CURRENT, "task", None)
    if task is None:  # a thread that others made
        yield
        return
    task.since = math.inf
    try:
        yield
    finally:
        task.since = time.monotonic()


def encoding_pool() -> ThreadPool:
    """Threads in which processors run, each of which does torch's work alone.

    A thread that calls torch gets a team of helpers of its own. For hundreds of threads that soon
    end, one of each conversation, that costs more than the pictures (three seconds instead of two,
    of 256 conversations), and helpers on busy cores keep their thread waiting. Threads that call torch
    for the first time after this have no helpers either; the trainer's own keeps its team.
    """
    pool = ThreadPool(os.cpu_count(), torch.set_num_threads, (1,))
    atexit.register(pool.terminate)
    return pool

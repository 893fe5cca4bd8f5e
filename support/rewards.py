"""What a reward function gave -> a number; and a limit of time for what users wrote."""
import asyncio
import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping

LOCK, LOOPS = threading.Lock(), []


def number(value) -> float:
    """The finite number that a reward function returned, awaited, or put under "reward".

    >>> from decimal import Decimal
    >>> number(True), number(Decimal("0.5")), number({"reward": 2})
    (1.0, 0.5, 2.0)
    """
    if inspect.isawaitable(value):
        value = asyncio.run_coroutine_threadsafe(wait_for(value), event_loop()).result()
    if isinstance(value, Mapping):
        value = value["reward"]
    if not math.isfinite(value):
        raise ValueError(f"a reward must be a finite number, not {value!r}")
    return float(value)


async def wait_for(awaitable):
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:  # which would end the loop, and all rewards
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def event_loop() -> asyncio.AbstractEventLoop:
    """One for all async rewards: their clients, once made, belong to it."""
    with LOCK:
        if not LOOPS:
            LOOPS.append(asyncio.new_event_loop())
            threading.Thread(target=LOOPS[0].run_forever, daemon=True).start()
        return LOOPS[0]


class Task:
    """action() in a thread of its own: one that never returns takes no thread of a pool with it."""

    def __init__(self, action: Callable):
        self.since, self.value, self.error = time.monotonic(), None, None
        self.thread = threading.Thread(target=self.run, args=(action,), daemon=True)
        self.thread.start()

    def run(self, action: Callable) -> None:
        try:
            self.value = action()
        except Exception as error:
            self.error = error
        except BaseException as error:  # SystemExit in here ends this thread, not who waits for it
            self.error = RuntimeError(f"{type(error).__name__}: {error}")

    def result(self, seconds: float, what: str, clock=None):
        """Its value or exception; TimeoutError if there is none so many seconds after clock.since.

        The clock is the task itself, which counts from its start, or an object that sets `since`
        anew with each sign of life.
        """
        clock = clock or self
        while self.thread.is_alive():
            left = clock.since + seconds - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no {what} in {seconds:g} s (see generation_timeout)")
            self.thread.join(min(left, 1))
        if self.error is not None:
            raise self.error
        return self.value

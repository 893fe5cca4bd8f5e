"""Reward functions, as users write them: what they are given, and the numbers that they give."""
import asyncio
import contextlib
import inspect
import math
import threading
from collections.abc import Mapping

LOCK, LOOPS = threading.Lock(), []  # the event loops of async rewards; the last one is in use
PATIENCE = 30  # seconds until a loop that an async reward holds up is given up


def scores(environment, completion: str | list[dict], answer,
           info: dict) -> tuple[float, dict[str, float]]:
    """The weighted sum of the rewards of a completion, and each of them by its name.

    Each function is given copies of answer and info: what it does to them reaches no other.
    """
    weights = environment.weights or [1.0] * len(environment.rewards)
    found, total = {}, 0.0
    for reward, weight in zip(environment.rewards, weights, strict=True):
        score = number(reward(completion, copied(answer), **copied(info)))
        found[reward.__name__] = score
        total += weight * score
    return number(total), found


def copied(value):
    """A copy of dicts and lists, however nested; all else is the same object."""
    if type(value) is dict:
        return {key: copied(entry) for key, entry in value.items()}
    if type(value) is list:
        return [copied(entry) for entry in value]
    return value


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
    if hasattr(value, "item"):  # an array or tensor of one number
        value = value.item()
    if not math.isfinite(value):
        raise ValueError(f"a reward must be a finite number, not {value!r}")
    return float(value)


async def wait_for(awaitable):
    return await awaitable


def event_loop() -> asyncio.AbstractEventLoop:
    """One for all async rewards: their clients, once made, belong to it.

    It is another one if an async reward holds it up, by time.sleep for example.
    """
    with LOCK:
        if not LOOPS or not answers(LOOPS[-1]):
            LOOPS.append(asyncio.new_event_loop())
            threading.Thread(target=run, args=(LOOPS[-1],), daemon=True).start()
        return LOOPS[-1]


def answers(loop: asyncio.AbstractEventLoop) -> bool:
    called = threading.Event()
    loop.call_soon_threadsafe(called.set)
    return called.wait(PATIENCE)


def run(loop: asyncio.AbstractEventLoop) -> None:
    """For ever: SystemExit, which ends a loop, ends the one reward that raised it."""
    while True:
        with contextlib.suppress(BaseException):
            loop.run_forever()

"""Rewards by name: whether a completion says the answer of its row. Each gives 1 or 0.

    exact    the same text
    number   the same number: the last one of the completion; 3/4 is one, and so are 1,000 and 1e3
    choice   the same letter, A to J: the only one of the completion that stands for itself
    json     the same value, of JSON in a block of code or without
    math     the same mathematics, by the package math-verify

Where a completion has a final answer, in \\boxed{} or <answer></answer>, the last of them is
compared, else all that stands behind </think>. An answer of a row is read in the same way.
"""
import functools
import importlib
import inspect
import json
import math as numbers
import re
from collections.abc import Callable
from fractions import Fraction

from envs import math_worker
from support.text import describe

TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
NUMBER = re.compile(r"(?<![\d.])(?:(?<!\w)[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
                    r"(?:[eE][-+]?\d+|\s*/\s*\d+)?")
LETTER = re.compile(r"(?<![\w'])[A-J](?![\w'])")
BLOCK = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


def final(text: str) -> str:
    """What a completion gives as its answer.

    >>> final("<think>A?</think> It is \\\\boxed{\\\\frac{1}{2}}."), final("<answer> B </answer>")
    ('\\\\frac{1}{2}', 'B')
    """
    if not isinstance(text, str):
        raise ValueError(f"{text!r:.80} is not a text")
    text = text.rpartition("</think>")[2]
    tagged = TAG.findall(text)
    if tagged:
        return final(tagged[-1])
    _, is_boxed, boxed = text.rpartition("\\boxed{")
    if is_boxed:
        depth = 1
        for place, letter in enumerate(boxed):
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                return boxed[:place].strip()
    return text.strip()


def exact(completion: str, answer: str, **info) -> float:
    return float(final(completion) == final(answer))


def number(completion: str, answer: str, **info) -> float:
    """ValueError if there is not one number in the answer."""
    wanted, said = [NUMBER.findall(final(text).replace("\u2212", "-"))
                    for text in (answer, completion)]
    if len(wanted) != 1:
        raise ValueError(f"{answer!r:.80} is not one number")
    return float(bool(said) and numbers.isclose(value(said[-1]), value(wanted[0]), rel_tol=1e-6))


def value(text: str) -> float:
    """
    >>> value("-1,200.5"), value("3 / 4"), value("1/0")
    (-1200.5, 0.75, nan)
    """
    above, _, below = text.replace(",", "").partition("/")
    try:
        if below:
            return float(Fraction(Fraction(above.strip()), int(below)))
        return float(above)
    except (ArithmeticError, ValueError):
        return numbers.nan


def choice(completion: str, answer: str, **info) -> float:
    """ValueError if the answer is no choice."""
    wanted, said = [set(LETTER.findall(final(text))) for text in (answer, completion)]
    if len(wanted) != 1:
        raise ValueError(f"{answer!r:.80} is not one letter from A to J")
    return float(said == wanted)


def json_value(completion: str, answer, **info) -> float:
    """ValueError if the answer is no JSON."""
    wanted = json.loads(answer) if isinstance(answer, str) else answer
    text = final(completion)
    block = BLOCK.search(text)
    try:
        return float(json.loads(block[1] if block else text) == wanted)
    except ValueError:
        return 0.0


def math(completion: str, answer: str, **info) -> float:
    """ValueError if math-verify cannot read the answer. LaTeX needs \\boxed{} or $ around it."""
    return float(math_worker.same(answer, completion) or exact(completion, answer))


NAMED = {"exact": exact, "number": number, "choice": choice, "json": json_value, "math": math}
QUICK = (exact, number, choice, json_value)  # enough to be tried on every row


def find_reward(name: str) -> Callable:
    """A reward by its name, or that of "module:function"; ValueError if there is none."""
    if name in NAMED:
        return NAMED[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f'reward {name!r} is none of {", ".join(NAMED)}, and no "module:function"')
    try:
        found = getattr(importlib.import_module(module), function)
        is_batched = "completions" in inspect.signature(found).parameters
    except Exception as error:  # a module of the user's can fail in any way
        raise ValueError(f"reward {name!r} cannot be imported: {describe(error)}") from error
    return of_a_batch(found) if is_batched else found


def of_a_batch(function: Callable) -> Callable:
    """A reward as TRL has it, f(prompts, completions, **columns) -> list, for one completion.

    It is given lists of one. As in TRL a completion is a text where the prompts of the data set are
    texts, and a list of messages where these are messages.
    """
    @functools.wraps(function)
    def reward(completion: str, answer, prompt, **columns):
        if not isinstance(prompt, str):
            completion = [{"role": "assistant", "content": completion}]
        lists = {name: [column] for name, column in {"answer": answer, **columns}.items()}
        rewards = function(prompts=[prompt], completions=[completion], **lists)
        if inspect.isawaitable(rewards):
            return only_later(rewards)
        return only(rewards)

    return reward


def only(rewards):
    if len(rewards) != 1:
        raise ValueError(f"it returned {len(rewards)} rewards for 1 completion")
    return rewards[0]


async def only_later(rewards):
    return only(await rewards)

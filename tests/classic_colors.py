"""The colors task of two turns as environments of verifiers' classic API, as published ones are."""
import asyncio
import random
import time

import verifiers as vf
from datasets import Dataset

from envs.colors import COLORS, draw
from support.images import png_data_uri


def asking(url: str, shape: str) -> dict:
    return {"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"What color is the {shape}? Answer with one word."}]}


def row(index: int) -> dict:
    rng = random.Random(f"classic-{index}")
    colors = [rng.choice(list(COLORS)) for _ in range(2)]
    shapes = [rng.choice(["square", "circle"]) for _ in range(2)]
    urls = [png_data_uri(draw(color, shape, rng)) for color, shape in zip(colors, shapes)]
    return {"prompt": [asking(urls[0], shapes[0])], "answer": colors[0],
            "info": {"colors": colors, "shapes": shapes, "urls": urls}}


def said(completion) -> list[str]:
    return [message["content"].strip() for message in completion if message["role"] == "assistant"]


def accuracy(completion, info) -> float:
    return sum(a == b for a, b in zip(said(completion), info["colors"])) / len(info["colors"])


async def brevity(completion, **kwargs) -> float:
    return -sum(map(len, said(completion))) / 100


def rarity(completions) -> list[float]:
    """A reward of the group: 1 for what no other conversation has said."""
    texts = [tuple(said(completion)) for completion in completions]
    return [float(texts.count(text) == 1) for text in texts]


class TwoColors(vf.MultiTurnEnv):
    """Shows a second image. The first example goes wrong there, if it is to."""
    fault = ""

    async def env_response(self, messages, state, **kwargs):
        turn, info = len(state["trajectory"]), state["info"]
        fault = self.fault if state["example_id"] == 0 else ""
        if fault == "error":
            raise vf.ToolCallError from KeyError("board")
        if fault == "bug":
            raise KeyError("board")
        if fault == "hangs":
            await asyncio.sleep(60)
        if fault == "blocks":
            time.sleep(5)
        if fault == "rewrites":
            messages[0] = vf.UserMessage(content="Forget it.")
        if fault == "image":
            return [asking("data:image/png;base64,AAAA", "circle")]
        return [asking(info["urls"][turn], info["shapes"][turn])]


def raises(info) -> float:
    if info["fault"]:
        raise KeyError("board")
    return 0.0


def look(region: str) -> str:
    """Look closer.

    Args:
        region: which part of the image
    """
    LOOKED.append(region)
    return "It is red."


LOOKED = []  # what the tool was really called with


def load_environment(num_train: int = 24, fault: str = "", group: bool = False,
                     tools: bool = False, timeout: float | None = None) -> vf.Environment:
    rows = [row(index) for index in range(num_train)]
    for number, entry in enumerate(rows):
        entry["info"]["fault"] = fault == "reward" and number == 0
    dataset = Dataset.from_list(rows)
    rewards = [accuracy, brevity] + [rarity] * group + [raises] * (fault == "reward")
    rubric = vf.Rubric(funcs=rewards, weights=[1.0] * len(rewards))
    if tools:
        return vf.ToolEnv(dataset=dataset, rubric=rubric, tools=[look], max_turns=3)
    environment = TwoColors(dataset=dataset, rubric=rubric, max_turns=2, timeout_seconds=timeout,
                            eval_dataset=dataset.select(range(4)))
    environment.fault = fault
    return environment

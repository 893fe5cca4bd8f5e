"""The colors task of two turns as a taskset of verifiers 0.4, as published ones are."""
import asyncio
import random
from collections.abc import Iterator

import verifiers.v1 as vf

from envs.colors import COLORS, draw
from support.images import png_data_uri

__all__ = ["TwoColors", "TwoColorsEnv"]


def asking(url: str, shape: str) -> vf.UserMessage:
    return vf.UserMessage(content=[
        vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url=url)),
        vf.TextContentPart(text=f"What color is the {shape}? Answer with one word.")])


class Data(vf.TaskData):
    colors: list[str]
    second: dict  # the message of the second turn


class TwoColorsTask(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def accuracy(self, trace: vf.Trace) -> float:
        said = [(message.content or "").strip() for message in trace.assistant_messages]
        return sum(a == b for a, b in zip(said, self.data.colors)) / len(self.data.colors)

    @vf.reward(weight=0.5)
    async def brevity(self, trace: vf.Trace) -> float:
        if self.data.name == "reward":
            raise KeyError("board")
        return -sum(len(message.content or "") for message in trace.assistant_messages) / 100

    @vf.metric
    async def turns(self, trace: vf.Trace) -> float:
        return float(len(trace.assistant_messages))


class TwoColorsEnv(vf.SingleAgentEnv):
    """Shows a second image. A task goes wrong there if its name says so."""

    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            segment = await talk.turn()
            if task.data.name == "error":
                raise KeyError("board")
            if task.data.name == "hangs":
                await asyncio.sleep(60)
            if not segment.terminated:
                await talk.turn([vf.UserMessage.model_validate(task.data.second)])


class TwoColorsConfig(vf.TasksetConfig):
    fault: str = ""  # of the first task


class TwoColors(vf.Taskset[TwoColorsTask, TwoColorsConfig]):
    INFINITE = True

    def load(self) -> Iterator[TwoColorsTask]:
        index = 0
        while True:
            rng = random.Random(f"taskset-{index}")
            colors = [rng.choice(list(COLORS)) for _ in range(2)]
            shapes = [rng.choice(["square", "circle"]) for _ in range(2)]
            first, second = [asking(png_data_uri(draw(color, shape, rng)), shape)
                             for color, shape in zip(colors, shapes)]
            if index == 0 and self.config.fault == "image":
                second = asking("data:image/png;base64,AAAA", "circle")
            yield TwoColorsTask(
                Data(idx=index, name=self.config.fault if index == 0 else None, prompt=[first],
                     system_prompt="Look.", colors=colors, second=second.model_dump()),
                self.config.task)
            index += 1

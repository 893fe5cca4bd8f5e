"""Name the color of a shape: the default environment, drawn on the fly, with nothing to download.

Each row is a picture with one colored square or circle on a noisy gray ground, and the question
what color it is. Picture sizes differ within a batch on purpose, so that every run exercises mixed
image sizes. A row is a function of (seed, split, index): the splits share no drawing, and any row
can be drawn again.
"""
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from rollout import Environment

COLORS = {"red": (210, 50, 50), "green": (50, 180, 60), "blue": (50, 80, 210),
          "yellow": (220, 210, 50)}
SIZES = [(56, 56), (84, 56), (56, 84)]  # Qwen2-VL works in 28 x 28 tiles: nothing is resized


class Drawings(Sequence):
    """Rows that are drawn when they are asked for; nothing is kept."""

    def __init__(self, seed: int, split: str, length: int):
        self.seed, self.split, self.length = seed, split, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")  # this is also what ends a for loop
        rng = random.Random(f"{self.seed}-{self.split}-{index}")
        color, shape = rng.choice(list(COLORS)), rng.choice(["square", "circle"])
        content = [{"type": "image", "image": draw(color, shape, rng)},
                   {"type": "text", "text": f"What color is the {shape}? Answer with one word."}]
        return {"prompt": [{"role": "user", "content": content}], "answer": color, "info": {}}


def draw(color: str, shape: str, rng: random.Random) -> Image.Image:
    """One filled shape of roughly that color, anywhere, 22 to 44 pixels wide."""
    width, height = rng.choice(SIZES)
    noise = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
    gray = Image.new("RGB", (width, height), (rng.randint(80, 180),) * 3)
    image = Image.blend(gray, noise, 0.25)
    side = rng.randint(22, 44)
    left, top = rng.randint(0, width - side), rng.randint(0, height - side)
    fill = tuple(channel + rng.randint(-30, 30) for channel in COLORS[color])
    pen = ImageDraw.Draw(image)
    outline = pen.rectangle if shape == "square" else pen.ellipse
    outline((left, top, left + side - 1, top + side - 1), fill=fill)
    return image


def accuracy(completion: str, answer: str, **info) -> float:
    """1 for the color's name and nothing else, so that the mean reward is the accuracy."""
    return float(completion.strip() == answer)


def load_environment(num_train: int = 2000, num_eval: int = 200, seed: int = 0) -> Environment:
    return Environment(train=Drawings(seed, "train", num_train),
                       eval=Drawings(seed, "eval", num_eval), rewards=[accuracy], weights=[1.0])

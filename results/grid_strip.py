"""Draw results/grid-strip.png: how a held-out board is walked before training and after it.

    python results/grid_strip.py outputs/grid/checkpoint-100

The policy answers in this process, without a server; its moves are sampled as in training.
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from envs.grid import load_environment

BEFORE = HERE.parent / "models" / "tiny-grid-vl"
WAY = 4          # moves: the first held-out board that needs so many, the most on a 3x3 board
SIDE, GAP, TEXT = 112, 12, 20
START = 60       # pixels for the name of the row


class Speaker:
    """A policy that answers in this process and keeps the pictures that it saw and its moves."""

    def __init__(self, folder: str | Path):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder)
        self.messages, self.images, self.moves = [], [], []

    def say(self, messages: list[dict]) -> str:
        self.messages += messages
        self.images += [part["image"] for part in messages[0]["content"] if "image" in part]
        text = self.processor.apply_chat_template(self.messages, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=self.images, return_tensors="pt")
        ids = self.model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=4)
        answer = self.processor.decode(ids[0, inputs["input_ids"].shape[1]:],
                                       skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        self.moves.append(answer)
        return answer


def walk(folder: str | Path) -> tuple[list[Image.Image], list[str]]:
    """The pictures of one walk, and the move that was made in each."""
    torch.manual_seed(0)
    speaker, environment = Speaker(folder), load_environment()
    row = next(row for row in environment.eval if row["info"]["board"].distance == WAY)
    found = environment.play(speaker.say, speaker.say(row["prompt"]), row["answer"], **row["info"])
    end = "reached" if found["solved"] else "not reached"
    captions = speaker.moves[:-1] + [f"{speaker.moves[-1]}: {end}"]
    return speaker.images, captions


def main():
    rows = [("before", walk(BEFORE)), ("after", walk(sys.argv[1]))]
    columns = max(len(images) for _, (images, _) in rows)
    strip = Image.new("RGB", (START + columns * (SIDE + GAP), len(rows) * (SIDE + TEXT + GAP)),
                      "white")
    pen = ImageDraw.Draw(strip)
    for number, (name, (images, captions)) in enumerate(rows):
        top = number * (SIDE + TEXT + GAP) + GAP // 2
        pen.text((GAP, top + SIDE // 2), name, fill="black")
        for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left = START + column * (SIDE + GAP)
            strip.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
            pen.text((left, top + SIDE + 4), caption, fill="black")
    strip.save(HERE / "grid-strip.png")


if __name__ == "__main__":
    main()

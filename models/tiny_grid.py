"""Makes models/tiny-grid-vl: a tiny Qwen2-VL that has learned to see a board, but not to walk.

    python -m models.tiny_grid

It is the architecture of models/tiny-qwen2-vl, warm-started on conversations about the boards of
envs/grid.py. Asked where a shape is, it names its cell, as on a chess board. Asked which way to go,
it was told a move that was drawn at random, whatever the picture showed: it knows the four words,
and starts as a random walk. What leads where is left to RL.

One number decides whether so small a model sees places at all. M-RoPE gives the columns of a
picture the lowest frequencies of a head. With Qwen's base of 10,000 and heads of 32, a step of one
column turns them by 0.003 radians at most, and all columns look alike; a base of 4 turns them by
0.42.
The same versions of the libraries on the same CPU write the same bytes.
"""
import random
from pathlib import Path

import torch
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from envs.grid import MOVES, QUESTION, Board, Cell, deal, draw, step
from models.tiny_qwen2_vl import make

OUT = Path(__file__).with_name("tiny-grid-vl")
SIZE = 3              # cells of a board, each way
LONG_STEPS, PICTURES = 250, 8  # conversations, once single pictures are understood
SHORT_STEPS, BATCH = 300, 64    # pictures per step
LEARNING_RATE = 2e-3
ROPE_THETA = 4.0

TEXT = ["system\nYou are a helpful assistant.", "user\n", "assistant\n",
        QUESTION, "Where is red?", "Where is green?", *MOVES]


def name(cell: Cell) -> str:
    """As on a chess board, but from the top: a1, b1, ..."""
    column, row = cell
    return "abcdefgh"[column] + str(row + 1)


def question(board: Board, rng: random.Random) -> tuple[str, str]:
    """A question about the board, and its answer. No answer tells which move is a good one."""
    return rng.choice([("Where is red?", name(board.agent)),
                       ("Where is green?", name(board.goal)),
                       (QUESTION, rng.choice(list(MOVES)))])


def conversation(pictures: int, rng: random.Random) -> list[dict]:
    """Questions along a random walk, each about a new picture, with their answers."""
    messages, board = [], deal(SIZE, rng)
    for _ in range(pictures):
        text, answer = question(board, rng)
        content = [{"type": "image", "image": draw(board, rng)}, {"type": "text", "text": text}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        board = step(board, rng.choice(list(MOVES)))
        if board.agent == board.goal:
            board = deal(SIZE, rng)
    return messages


def encode(conversations: list[list[dict]], processor: Qwen2VLProcessor) -> dict:
    """The model's inputs, with labels for what the assistant says, <|im_end|> included."""
    texts, images = [], []
    for messages in conversations:
        texts.append(processor.apply_chat_template(messages))
        images += [message["content"][0]["image"] for message in messages[::2]]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    tokenizer = processor.tokenizer
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        for start in range(len(ids)):
            if ids[start:start + len(header)] == header:
                answer = slice(start + len(header), ids.index(tokenizer.eos_token_id, start) + 1)
                labels[row, answer] = inputs["input_ids"][row, answer]
    return {**inputs, "labels": labels}


def warm_start(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor):
    """Supervised steps: on single pictures first, then on conversations as long as a game."""
    rng = random.Random(0)
    steps = SHORT_STEPS + LONG_STEPS
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for number in range(steps):
        pictures = 1 if number < SHORT_STEPS else PICTURES
        inputs = encode([conversation(pictures, rng) for _ in range(BATCH // pictures)], processor)
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if number % 50 == 0 or number == steps - 1:
            print(f"step {number:3d}  loss {loss:.3f}  {accuracies(model, processor)}", flush=True)


def accuracies(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor) -> dict:
    """{question: share of right tokens of its answers} in held-out conversations."""
    rng = random.Random("held out")
    conversations = [conversation(PICTURES, rng) for _ in range(32)]
    inputs = encode(conversations, processor)
    with torch.no_grad():
        guesses = model(**inputs).logits[:, :-1].argmax(-1)
    labels = inputs["labels"][:, 1:]
    found = {}
    for messages, guess, label in zip(conversations, guesses, labels, strict=True):
        right = (guess == label)[(label != -100) & (label != processor.tokenizer.eos_token_id)]
        right = right.tolist()
        for asked, answered in zip(messages[::2], messages[1::2], strict=True):
            length = len(processor.tokenizer(answered["content"])["input_ids"])
            found.setdefault(asked["content"][1]["text"], []).extend(right[:length])
            right = right[length:]
    return {text: round(sum(right) / len(right), 3) for text, right in found.items()}


if __name__ == "__main__":
    make(OUT, warm_start, TEXT, ROPE_THETA)

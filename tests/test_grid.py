"""The grid to walk on: its boards, what pictures show, and what can be reached without looking."""
import itertools
import random
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from conftest import ROOT
from envs.grid import CELL, MOVES, Board, load_environment, moves_to_goal, step, success, turned
from support.config import load_config

CELLS = list(itertools.product(range(3), repeat=2))
PAIRS = list(itertools.permutations(CELLS, 2))


def picture(messages) -> Image.Image:
    return messages[0]["content"][0]["image"]


def centre(mask) -> tuple[int, int]:
    """The cell that most of the mask's pixels are in."""
    rows, columns = mask.nonzero()
    return int(numpy.median(columns)) // CELL, int(numpy.median(rows)) // CELL


def seen(image: Image.Image) -> Board:
    """The board as anybody can read it in the picture."""
    red, green, blue = numpy.asarray(image).astype(int).transpose(2, 0, 1)
    return Board(3, agent=centre((red - green > 80) & (red - blue > 80)),
                 goal=centre((green - red > 58) & (green - blue > 58)))


def best_move(board: Board) -> str:
    return min(MOVES, key=lambda move: step(board, move).distance)


def walk(environment, row: dict, policy) -> tuple[dict, list[Image.Image]]:
    """What play returned when policy(image) answered, and all pictures that it was shown."""
    images = [picture(row["prompt"])]

    def say(messages):
        images.append(picture(messages))
        return policy(images[-1])

    return environment.play(say, policy(images[0]), row["answer"], **row["info"]), images


def test_a_row_is_a_function_of_seed_split_and_index():
    one, same, other = (load_environment(seed=seed) for seed in (3, 3, 4))
    rows = [one.train[5], one.train[6], one.eval[5], other.train[5]]
    pixels = [picture(row["prompt"]).tobytes() for row in rows]
    assert len(set(pixels)) == 4
    assert picture(same.train[5]["prompt"]).tobytes() == pixels[0]
    # Of a group each conversation that moves alike is shown the same pictures.
    stay = [walk(environment, environment.train[5], lambda image: "stay")[1]
            for environment in (one, same)]
    assert [image.tobytes() for image in stay[0]] == [image.tobytes() for image in stay[1]]
    assert len({image.tobytes() for image in stay[0]}) == 8


def test_who_looks_reaches_the_goal_by_a_shortest_way():
    environment = load_environment()
    for row in itertools.islice(environment.eval, 100):
        board = row["info"]["board"]
        assert seen(picture(row["prompt"])) == board
        found, images = walk(environment, row, lambda image: best_move(seen(image)))
        assert found == {"solved": True, "moves": board.distance} and board.distance >= 2
        assert len(images) == board.distance


def test_who_does_not_look_does_not_get_there():
    """The figures in the docstring of envs/grid.py, by counting; play() agrees."""
    boards = [Board(3, *pair) for pair in PAIRS]
    place = {board: number for number, board in enumerate(boards)}
    there = len(boards)  # the number of what is beyond the goal
    after = numpy.zeros((4, there + 1, there + 1))  # chances by (move, before, after)
    after[:, there, there] = 1
    for move, word in enumerate(MOVES):
        for board in boards:
            moved = step(board, word)
            for way in (moved, turned(moved)):
                after[move, place[board], place[way] if way.distance else there] += 0.5
    by_chance, by_plan = [], []
    for board in boards:
        if board.distance >= 2:
            chances = plans = numpy.eye(there + 1)[[place[board]]]
            for _ in range(8):
                chances = chances @ after.mean(0)
                plans = numpy.concatenate([plans @ after[move] for move in range(4)])
                plans = numpy.unique(plans.round(12), axis=0)  # of all sequences of moves
            by_chance.append(chances[0, there])
            by_plan.append(plans[:, there].max())
    assert numpy.mean(by_chance) == pytest.approx(0.325, abs=5e-4)
    assert numpy.mean(by_plan) == pytest.approx(0.799, abs=5e-4)

    rng, environment = random.Random(0), load_environment(num_eval=300)
    walks = [walk(environment, row, lambda image: rng.choice(list(MOVES)))[0]
             for row in environment.eval]
    assert sum(found["solved"] for found in walks) / 300 == pytest.approx(0.325, abs=0.07)


def test_a_board_that_is_turned_wants_the_opposite_move():
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for pair in PAIRS:
        board = Board(3, *pair)
        assert turned(turned(board)) == board and turned(board).distance == board.distance
        for move in MOVES:
            assert turned(step(turned(board), move)) == step(board, opposite[move])


def test_blind_walks_are_shown_gray_after_the_first_picture():
    environment, seeing = load_environment(blind=True), load_environment()
    row = environment.eval[0]
    assert picture(row["prompt"]).tobytes() == picture(seeing.eval[0]["prompt"]).tobytes()
    images = walk(environment, row, lambda image: "stay")[1]
    assert [image.getcolors() for image in images[1:]] == [[(84 * 84, (128, 128, 128))]] * 7


def test_other_words_are_moves_that_lead_nowhere():
    board = Board(3, agent=(0, 1), goal=(2, 1))
    assert [step(board, word).agent for word in ("jump", "", "left", " right\n", "right right")] == [
        (0, 1), (0, 1), (0, 1), (1, 1), (0, 1)]
    environment = load_environment()
    found, images = walk(environment, environment.eval[0], lambda image: "jump")
    assert found == {"solved": False, "moves": 8} and len(images) == 8


def test_rewards():
    environment = load_environment(cost=0.1)
    assert environment.rewards == [success, moves_to_goal] and environment.weights == [1.0, -0.1]
    assert [f([], "", solved=True, moves=3) for f in environment.rewards] == [1, 3]
    assert [f([], "", solved=False, moves=6) for f in environment.rewards] == [0, 0]
    assert [f([], "", board=None, name="") for f in environment.rewards] == [0, 0]  # it broke off


def test_the_checkpoint_starts_as_a_random_walk():
    """It says the four words alike and hardly any other, whatever it sees."""
    folder = Path(load_config(str(ROOT / "configs" / "grid.toml")).model)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4e6
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    prompts = [row["prompt"] for row in itertools.islice(load_environment().eval, 32)]
    texts = [processor.apply_chat_template(prompt, add_generation_prompt=True) for prompt in prompts]
    inputs = processor(text=texts, images=[picture(prompt) for prompt in prompts],
                       return_tensors="pt")
    words = [processor.tokenizer(move)["input_ids"] for move in MOVES]
    assert all(len(ids) == 1 for ids in words)
    with torch.no_grad():
        chances = model(**inputs).logits[:, -1].softmax(-1)[:, sum(words, [])]
    assert (chances.sum(1) > 0.95).all()
    assert (chances.mean(0) - 0.25).abs().max() < 0.1

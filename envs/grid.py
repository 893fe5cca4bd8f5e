"""Walk to the goal: several turns, and every new picture decides the next answer.

The policy is the red shape on a small board and has to reach the green one. It answers with one
move; the environment moves it, turns the board upside down or leaves it, at random, draws it with
new looks, and asks again. A move means what it means in the newest picture, so nobody can plan the
way from the first one. Exactly, on 3x3 boards whose goal is at least two moves away, in 8 turns:
random moves reach it on 32.5 % of the boards, and the best moves that can be chosen from the first
picture alone on 79.9 %.

(If the board is turned by random quarters instead, a policy can say "up" and "down" alone and wait
for the goal to come to lie there. Some seeds learned that, and stopped at 85 %.)

A row is a function of (seed, split, index): where red and green are, how the board is turned and
how it is drawn in each turn. No drawing of one split is in the other; but a 3x3 board has only 72
places of red and green, which are in both.
"""
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from rollout import Environment

MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RED, GREEN = (210, 50, 50), (50, 180, 60)
CELL = 28  # pixels: one image token of Qwen2-VL
QUESTION = "Which way from red to green?"

Cell = tuple[int, int]  # column and row, from the upper left corner


@dataclass(frozen=True)
class Board:
    size: int
    agent: Cell
    goal: Cell

    @property
    def distance(self) -> int:
        """The moves of the shortest way to the goal."""
        return sum(abs(a - g) for a, g in zip(self.agent, self.goal, strict=True))


def deal(size: int, rng: random.Random, distance: int = 1) -> Board:
    """Agent and goal in two cells of an empty board, at least so many moves apart."""
    cells = [(column, row) for column in range(size) for row in range(size)]
    while True:
        board = Board(size, *rng.sample(cells, 2))
        if board.distance >= distance:
            return board


def step(board: Board, move: str) -> Board:
    """The board after a move. At an edge, and with any other word, the agent stays."""
    across, down = MOVES.get(move.strip(), (0, 0))
    column = min(max(board.agent[0] + across, 0), board.size - 1)
    row = min(max(board.agent[1] + down, 0), board.size - 1)
    return replace(board, agent=(column, row))


def turned(board: Board) -> Board:
    """The board upside down, as if everybody walked around it to the other side."""
    agent, goal = [(board.size - 1 - column, board.size - 1 - row)
                   for column, row in (board.agent, board.goal)]
    return Board(board.size, agent, goal)


def draw(board: Board, rng: random.Random) -> Image.Image:
    """The board on a noisy ground: shapes, their sizes, places in the cell and tints vary."""
    side = board.size * CELL
    noise = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
    gray = Image.new("RGB", (side, side), (rng.randint(80, 180),) * 3)
    image = Image.blend(gray, noise, 0.25)
    pen = ImageDraw.Draw(image)
    for cell, color in ((board.goal, GREEN), (board.agent, RED)):  # the agent is on top
        outline = rng.choice([pen.rectangle, pen.ellipse])
        width = rng.randint(16, 24)
        left, top = (CELL * place + rng.randint(0, CELL - width) for place in cell)
        fill = tuple(channel + rng.randint(-30, 30) for channel in color)
        outline((left, top, left + width - 1, top + width - 1), fill=fill)
    return image


def ask(image: Image.Image) -> list[dict]:
    """The messages of a turn."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


class Boards(Sequence):
    """Rows that are drawn when they are asked for; nothing is kept."""

    def __init__(self, seed: int, split: str, length: int, size: int, distance: int):
        self.seed, self.split, self.length = seed, split, length
        self.size, self.distance = size, distance

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")  # this is also what ends a for loop
        name = f"{self.seed}-{self.split}-{index}"
        board = deal(self.size, random.Random(name), self.distance)
        image = draw(board, random.Random(f"{name}-0"))
        return {"prompt": ask(image), "answer": "", "info": {"board": board, "name": name}}


def success(completion: list[dict], answer: str, solved: bool = False, **info) -> float:
    """1 if the goal was reached, so that the mean is the share of the boards that are solved."""
    return float(solved)


def moves_to_goal(completion: list[dict], answer: str, solved: bool = False, moves: int = 0,
                  **info) -> float:
    """How many moves it took, or 0 if the goal was not reached."""
    return float(moves if solved else 0)


def load_environment(num_train: int = 2000, num_eval: int = 200, seed: int = 0, size: int = 3,
                     distance: int = 2, turns: int = 8, cost: float = 0.1,
                     blind: bool = False) -> Environment:
    """Boards whose goal is at least `distance` moves away, and at most `turns` moves to reach it.

    The reward is 1 - cost * moves for that, else 0. With `blind`, all pictures after the first turn
    are gray.
    """

    def play(say: Callable, completion: str, answer: str, board: Board, name: str) -> dict:
        moves = 1
        board = step(board, completion)
        while board.distance and moves < turns:
            rng = random.Random(f"{name}-{moves}")  # the same for every conversation of a group
            board = rng.choice([board, turned(board)])
            image = draw(board, rng)
            if blind:
                image = Image.new("RGB", image.size, (128, 128, 128))
            completion = say(ask(image))
            moves += 1
            board = step(board, completion)
        return {"solved": board.distance == 0, "moves": moves}

    return Environment(train=Boards(seed, "train", num_train, size, distance),
                       eval=Boards(seed, "eval", num_eval, size, distance),
                       rewards=[success, moves_to_goal], weights=[1.0, -cost], play=play)

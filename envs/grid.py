"""Walk to the goal: a game of several turns, in which every new picture decides the next answer.

The policy is the red shape on a small board and has to reach the green one. It answers with one
move, the environment moves it, draws the new board and asks again. A row's board is a function of
(seed, split, index), its looks of the turn, too: the splits share no drawing, and any of them can
be drawn again.
"""
import random
from collections.abc import Sequence
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


def deal(size: int, rng: random.Random) -> Board:
    """Agent and goal in two cells of an empty board."""
    cells = [(column, row) for column in range(size) for row in range(size)]
    agent, goal = rng.sample(cells, 2)
    return Board(size, agent, goal)


def step(board: Board, move: str) -> Board:
    """The board after a move. At an edge, and with any other word, the agent stays."""
    across, down = MOVES.get(move.strip(), (0, 0))
    column = min(max(board.agent[0] + across, 0), board.size - 1)
    row = min(max(board.agent[1] + down, 0), board.size - 1)
    return replace(board, agent=(column, row))


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

    def __init__(self, seed: int, split: str, length: int, size: int):
        self.seed, self.split, self.length, self.size = seed, split, length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")  # this is also what ends a for loop
        name = f"{self.seed}-{self.split}-{index}"
        board = deal(self.size, random.Random(name))
        image = draw(board, random.Random(f"{name}-0"))
        return {"prompt": ask(image), "answer": "", "info": {"start": board, "name": name}}


def play(start: Board, moves: list[str]) -> Board:
    """The board after these moves."""
    board = start
    for move in moves:
        board = step(board, move)
    return board


def reached(completion: list[str], answer: str, start: Board, name: str) -> float:
    """1 if the last move reached the goal, so that the mean is the share of boards that are won."""
    board = play(start, completion)
    return float(board.agent == board.goal)


def moves(completion: list[str], answer: str, start: Board, name: str) -> float:
    """How many moves it took."""
    return len(completion)


def load_environment(num_train: int = 2000, num_eval: int = 200, seed: int = 0, size: int = 3,
                     turns: int = 6, cost: float = 0.0, gray: bool = False) -> Environment:
    """At most `turns` moves, each at a cost; `gray` shows nothing after the first turn.

    A random walk reaches the goal of a 3x3 board in 6 moves one time in three.
    """

    def reply(messages: list[dict], answer: str, start: Board, name: str) -> list[dict] | None:
        done = [message["content"] for message in messages if message["role"] == "assistant"]
        board = play(start, done)
        if board.agent == board.goal or len(done) == turns:
            return None
        image = draw(board, random.Random(f"{name}-{len(done)}"))
        if gray:
            image = Image.new("RGB", image.size, (128, 128, 128))
        return ask(image)

    return Environment(train=Boards(seed, "train", num_train, size),
                       eval=Boards(seed, "eval", num_eval, size), rewards=[reached, moves],
                       weights=[1.0, -cost], reply=reply)

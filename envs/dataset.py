"""Your own data, without code: rows of files or of the hub, and a reward by its name.

    [env]
    id = "dataset"

    [env.args]
    train = "data/train.jsonl"   # .jsonl, .json, .parquet, a folder of these, or an id of the hub
    eval = "data/test.jsonl"
    reward = "number"            # or several; see envs/answers.py
    template = '{question} Put the answer in \\boxed{}.'

The hub, and folders of other forms, are read by the package datasets; "NAME:SPLIT" names a split,
without one they are "train" and "test". Columns are found by these names, if only one of each line
is there, or given as args:

    question   a text:         question, problem, prompt
               chat messages:  messages, prompt; the last one, of an assistant, may be the answer
               ShareGPT:       conversations; the same
    images     images, image, file_name: one or a list of a path (from the data file's folder on),
               URL, data URI, base64, bytes, {"bytes", "path"}; none: images = ""
    answer     answer, solution

<image> in a text is the place of the next image. A place without an image, or an image without a
place, is an error, but for one case: images of a row without any place stand before the text of the
first message of the user. Beside such rows one that has no image at all is an error, too.

`template` is put around the text of the last message; {column} in it is what stands there, a list
as lines that begin with A., B., ...

Rewards are given the text of the completion, the answer, and as further info all other columns but
the images, and "prompt". All rows are checked before anything is trained, but for the inside of
their images: ValueError names file, row and column.
"""
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from envs import answers
from envs.row_parts import (around, as_text, checked_answer, conversation, fill, has_place,
                            image_parts, located, show_first)
from envs.tables import Table, read
from rollout import Environment
from support.images import load_image
from support.prompts import MARKER, clean_prompt, column
from support.rewards import scores
from support.text import describe

NAMES = {"question": ("question", "problem", "prompt", "messages", "conversations"),
         "images": ("images", "image", "file_name"), "answer": ("answer", "solution")}
QUESTION = "{question}"


@contextlib.contextmanager
def named(place: str):
    """ValueErrors in here say this place first."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


@dataclass(frozen=True)
class Columns:
    """The names of the columns of a table; "" where there is none."""
    question: str
    images: str
    answer: str


def find_columns(table: Table, given: dict[str, str | None]) -> Columns:
    """The given ones, else those that there are; ValueError if several could be meant."""
    names, found = table.columns(), {}
    for kind, known in NAMES.items():
        there = [name for name in known if name in names]
        if given[kind] is not None:
            there = [given[kind]]
        if len(there) > 1:
            raise ValueError(f"{table.name} has the columns {' and '.join(there)}: say which one "
                             f'is meant, {kind} = "..."')
        if there and there[0] and there[0] not in names:
            raise ValueError(f"{table.name} has no column {there[0]!r}, but {', '.join(names)}")
        found[kind] = there[0] if there else ""
    if not found["question"]:
        raise ValueError(f"{table.name} has no column {' or '.join(NAMES['question'])}, but "
                         f'{", ".join(names)}: say question = "..."')
    return Columns(**found)


class Rows(Sequence):
    """The rows of a split as an environment has them. Images are opened when a row is asked for."""

    def __init__(self, tables: list[Table], given: dict, template: str, system: str, most: int):
        self.columns = {table.name: find_columns(table, given) for table in tables}
        self.places = [(table, number) for table in tables for number in range(len(table.rows))]
        self.places = self.places[:most or None]
        self.before, self.after = template.split(QUESTION)
        self.system = system
        self.text_alone = given["images"] == ""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self.row(index)
        for part, place in image_parts(row["prompt"], row["at"]["images"]):
            with named(place):
                part["image"] = load_image(part["image"])
        return {name: row[name] for name in ("prompt", "answer", "info")}

    def place(self, index: int) -> str:
        table, number = self.places[index]
        return table.where(number)

    def row(self, index: int, reserved: Sequence[str] = ()) -> dict:
        """The row with the sources of its images, which are not opened."""
        table, number = self.places[index]
        raw, names, where = table.rows[number], self.columns[table.name], table.where(number)
        at = {kind: f"{where}, column `{getattr(names, kind)}`" for kind in NAMES}
        if not names.answer:  # the last message is the answer
            at["answer"] = at["question"]
        images = column(raw, names.images)
        if not images:  # the messages may have some
            at["images"] = at["question"]
        if column(raw, "videos"):
            raise ValueError(f"{where}, column `videos`: videos are not shown to the model")
        with named(at["question"]):
            messages, said = conversation(raw.get(names.question))
        with named(f"{where}, template"):
            before, after = [fill(text, raw, hidden=(names.answer, names.images))
                             for text in (self.before, self.after)]
        question = messages[-1]
        question["content"] = around(question["content"], before, after)
        asked = question["content"] if isinstance(raw[names.question], str) else messages
        if self.system and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        has_places = any(has_place(message) for message in messages)
        if images and not has_places:
            show_first(messages, len(images))
        with named(at["question"]):
            prompt = clean_prompt(messages, images, reserved)
        for part, place in image_parts(prompt, at["images"]):
            with named(place):
                part["image"] = located(part.pop(part["type"]), table.folder)
                part["type"] = "image"
        with named(at["answer"]):
            answer = checked_answer(raw.get(names.answer) if names.answer else said)
        others = {name: entry for name, entry in raw.items()
                  if name not in (names.images, "answer", "completion")}
        return {"prompt": prompt, "answer": answer, "info": {**others, "prompt": asked},
                "at": at, "has_places": has_places}

    def check(self, rewards: Sequence = (), reserved: Sequence[str] = ()) -> None:
        """ValueError names the first bad row, and says how many there are.

        With the reserved strings of a model, texts that quote them are bad, too; and so is an
        answer that is not worth 1 to each of the rewards.
        """
        errors, kinds = [], {}  # whether rows have images, and places for them: where one is
        for index in range(len(self)):
            try:
                row = self.row(index, reserved)
                has_images = bool(image_parts(row["prompt"], ""))
                kinds.setdefault((has_images, row["has_places"]), row["at"]["question"])
                with named(row["at"]["answer"]):
                    for reward in rewards:
                        if reward(as_text(row["answer"]), row["answer"]) != 1:
                            raise ValueError(f"{row['answer']!r:.80} is no answer for the reward "
                                             f"{reward.__name__}")
            except ValueError as error:
                errors.append(error)
        if errors:
            count = f" (bad rows: {len(errors)})" if errors[1:] else ""
            raise ValueError(f"{errors[0]}{count}") from errors[0]
        self.check_images(kinds)

    def check_images(self, kinds: dict[tuple[bool, bool], str]) -> None:
        """ValueError if a question may be about an image that is not there."""
        if (False, False) in kinds and (True, False) in kinds:
            raise ValueError(f"{kinds[False, False]}: the row has no image. Others have one "
                             f"without {MARKER} in a text, so that this one may lack its own")
        shown = any(has_images for has_images, _ in kinds)
        if self.places and not shown and not self.text_alone:
            table, _ = self.places[0]
            raise ValueError(f"no row of {table.name} shows an image; its columns are "
                             f'{", ".join(table.columns())}: say images = "...", or images = "" if '
                             "it is text alone")


def load_environment(train: str, eval: str = "", images: str | None = None,
                     question: str | None = None, answer: str | None = None,
                     template: str = QUESTION, system: str = "", subset: str = "",
                     reward: str | list[str] = "exact", weights: list[float] | None = None,
                     num_train: int = 0, num_eval: int = 0) -> Environment:
    """The first num_train and num_eval rows, or all. `subset` is a data set's of the hub."""
    if template.count(QUESTION) != 1:
        raise ValueError(f"template must hold {QUESTION} once, not {template!r}")
    if not train:
        raise ValueError("train must name a file, a folder, or an id of the hub")
    given = {"images": images, "question": question, "answer": answer}
    names = [reward] if isinstance(reward, str) else reward
    rewards = [answers.find_reward(name) for name in names]
    rows = []
    for source, split, most in ((train, "train", num_train), (eval, "test", num_eval)):
        tables = read(source, split, subset) if source else []
        rows.append(Rows(tables, given, template, system, most))
    environment = Environment(*rows, rewards=rewards, weights=weights)
    for split in rows:
        split.check([function for function in rewards if function in answers.QUICK])
    try_rewards(environment)
    return environment


def try_rewards(environment: Environment) -> None:
    """ValueError if a reward fails where the completion is the answer of the first row."""
    rows = environment.train
    row = rows.row(0)
    try:
        scores(environment, as_text(row["answer"]), row["answer"], row["info"])
    except Exception as error:  # those of the user's own fail in any way
        names = ", ".join(function.__name__ for function in environment.rewards)
        raise ValueError(f"{rows.place(0)}: a reward ({names}) fails where the completion is the "
                         f"answer itself: {describe(error)}") from error

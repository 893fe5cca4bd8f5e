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
first message of the user. `template` is put around the text of the last message; {column} in it
is what stands there, a list as lines that begin with A., B., ...

Rewards are given the text of the completion, the answer, and as further info all other columns but
the images, and "prompt". All rows are checked before anything is trained, but for the inside of
their images: ValueError names file, row and column.
"""
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from envs import answers
from envs.tables import Table, read
from rollout import Environment
from support.images import first_value, load_image
from support.prompts import MARKER, clean_prompt, column, is_source
from support.rewards import scores
from support.text import describe

NAMES = {"question": ("question", "problem", "prompt", "messages", "conversations"),
         "images": ("images", "image", "file_name"), "answer": ("answer", "solution")}
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's words for roles
BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # so PNG, JPEG, GIF and WEBP begin
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
        for part, place in image_parts(row, self.place(index)):
            with named(place):
                part["image"] = load_image(part["image"])
        return {name: row[name] for name in ("prompt", "answer", "info")}

    def place(self, index: int) -> str:
        table, number = self.places[index]
        return table.where(number)

    def row(self, index: int, reserved: Sequence[str] = ()) -> dict:
        """The row with the sources of its images, which are not opened."""
        table, number = self.places[index]
        names, where = self.columns[table.name], table.where(number)
        raw = table.rows[number]
        with named(f"{where}, column `{names.question}`"):
            messages, said = conversation(raw.get(names.question))
        if column(raw, "videos"):
            raise ValueError(f"{where}, column `videos`: videos are not shown to the model")
        with named(f"{where}, template"):
            before, after = [fill(text, raw, names) for text in (self.before, self.after)]
        messages[-1]["content"] = around(messages[-1]["content"], before, after)
        if self.system and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        images = column(raw, names.images)
        if images and not any(has_place(message) for message in messages):
            show_first(messages, len(images))
        with named(f"{where}, column `{names.question}`"):
            prompt = clean_prompt(messages, images, reserved)
        row = {"prompt": prompt, "images": names.images if images else names.question,
               "answer_column": names.answer or names.question}
        for part, place in image_parts(row, where):
            with named(place):
                part["image"] = located(part.pop(part["type"]), table.folder)
                part["type"] = "image"
        with named(f"{where}, column `{row['answer_column']}`"):
            row["answer"] = checked_answer(raw.get(names.answer) if names.answer else said)
        hidden = {names.images, "answer", "completion"}
        row["info"] = {name: entry for name, entry in raw.items() if name not in hidden}
        is_text = isinstance(raw[names.question], str)
        row["info"]["prompt"] = before + raw[names.question] + after if is_text else messages
        return row

    def check(self, rewards: Sequence = (), reserved: Sequence[str] = ()) -> None:
        """ValueError names the first bad row, and says how many more there are.

        With the reserved strings of a model, texts that quote them are bad, too; and so is an
        answer that is not worth 1 to each of the rewards.
        """
        errors, shown = [], 0
        for index in range(len(self)):
            try:
                row = self.row(index, reserved)
                shown += len(image_parts(row, ""))
                with named(f"{self.place(index)}, column `{row['answer_column']}`"):
                    for reward in rewards:
                        if reward(as_text(row["answer"]), row["answer"]) != 1:
                            raise ValueError(f"{row['answer']!r:.80} is no answer for the reward "
                                             f"{reward.__name__}")
            except ValueError as error:
                errors.append(error)
        if errors:
            more = f" (and {len(errors) - 1} more rows are bad)" if errors[1:] else ""
            raise ValueError(f"{errors[0]}{more}") from errors[0]
        if self.places and not shown and not self.text_alone:
            table, _ = self.places[0]
            raise ValueError(f"no row of {table.name} shows an image; its columns are "
                             f'{", ".join(table.columns())}: say images = "...", or images = "" if '
                             "it is text alone")


# ---- the parts of a row

def conversation(question) -> tuple[list[dict], str | None]:
    """(chat messages up to the last one of the user, what the assistant says after it).

    Of a text, chat messages, or ShareGPT's {"from", "value"}.
    """
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    if not isinstance(question, list) or not question:
        raise ValueError(f"{question!r:.80} is no text, and no list of messages")
    messages, said = [], None
    for message in question:
        if not isinstance(message, Mapping):
            raise ValueError(f"{message!r:.80} is no message")
        if message.get("from") is not None:
            role = SPEAKERS.get(message["from"], message["from"])
            message = {"role": role, "content": message.get("value")}
        messages.append(dict(message))
    if messages[-1].get("role") == "assistant":
        said = joined(messages.pop())
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("the last message, before an answer, must be one of the user")
    if not joined(messages[-1]).replace(MARKER, "").strip():
        raise ValueError("the question is empty")
    return messages, said


def parts_of(message: dict) -> list:
    content = message.get("content")
    return content if isinstance(content, list) else [content]


def joined(message: dict) -> str:
    """The texts of a message."""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts_of(message)]
    return "".join(text for text in texts if isinstance(text, str))


def has_place(message: dict) -> bool:
    """Whether an image belongs somewhere in a message, or is there."""
    return MARKER in joined(message) or any(
        isinstance(part, Mapping) and part.get("text") is None for part in parts_of(message))


def show_first(messages: list[dict], count: int) -> None:
    """Put places for so many images before the text of the first message of the user."""
    first = next(message for message in messages if message.get("role") == "user")
    first["content"] = [{"type": "image"}] * count + parts_of(first)


def around(content, before: str, after: str):
    """The content of a message between two texts."""
    if isinstance(content, str):
        return before + content + after
    texts = [[{"type": "text", "text": text}] if text else [] for text in (before, after)]
    return texts[0] + list(content) + texts[1]


def fill(template: str, row: Mapping, names: Columns) -> str:
    """A part of the template, with the columns that it names."""
    def column_text(match: re.Match) -> str:
        name = match[1]
        if name not in row or name in (names.answer, names.images):
            raise ValueError(f"{{{name}}} must name a column of the row that is not the answer")
        if isinstance(row[name], list):
            lettered = zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", row[name])
            return "\n".join(f"{letter}. {as_text(entry)}" for letter, entry in lettered)
        return as_text(row[name])

    return re.sub(r"\{(\w+)\}", column_text, template)


def as_text(value) -> str:
    """A text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def checked_answer(answer):
    """A text; lists and tables, for JSON and rewards of one's own, stay as they are."""
    if not is_source(answer) or isinstance(answer, str) and not answer.strip():
        raise ValueError("there is no answer")
    return answer if isinstance(answer, (list, Mapping)) else as_text(answer)


def image_parts(row: dict, where: str) -> list[tuple[dict, str]]:
    """(each image part of a row, its place for messages)."""
    found = []
    for message in row["prompt"]:
        for part in parts_of(message):
            if isinstance(part, Mapping) and part["type"] != "text":
                found.append((part, f"{where}, column `{row['images']}`, image {len(found)}"))
    return found


def located(source, folder: Path):
    """An image as load_image takes it; ValueError if it is none, or its file is not there."""
    if isinstance(source, Mapping):
        source = first_value(source, ("url", "bytes", "path"))
    if isinstance(source, (bytes, Image.Image)):
        return source
    if not isinstance(source, str):
        raise ValueError(f"{source!r:.80} is no image")
    if source.startswith("data:") or "://" in source:
        return source
    if source.startswith(BASE64):
        return f"data:;base64,{source}"
    path = folder / Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return str(path)


# ---- the environment

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

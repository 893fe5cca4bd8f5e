"""Files of a data set -> tables of rows, which are read when they are asked for.

JSONL and JSON need nothing, parquet needs the package pyarrow, and what `datasets.load_dataset`
loads (an id of the hub, a folder of another form) needs the package datasets. ValueError names the
file, and the line or row in it.
"""
import bisect
import contextlib
import importlib
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.text import describe

SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}  # as files are named


@dataclass(frozen=True)
class Table:
    """Rows of one file, each a dict by column."""
    name: str
    rows: Sequence[dict]
    folder: Path = Path()               # where relative paths of images begin
    lines: Sequence[int] | None = None  # of JSONL, the line of each row, from 1

    def where(self, number: int) -> str:
        """The place of a row, for messages."""
        if self.lines:
            return f"{self.name}, line {self.lines[number]}"
        return f"{self.name}, row {number} (from 0)"

    def columns(self) -> list[str]:
        """The names of all columns. Rows of JSON may differ, those of other tables do not."""
        rows = self.rows if isinstance(self.rows, list) else [self.rows[0]]
        return list(dict.fromkeys(name for row in rows for name in row))


def read(source: str, split: str, subset: str = "") -> list[Table]:
    """The tables of a file, of a folder, or of an id of the hub; ValueError if one has no rows.

    "SOURCE:SPLIT" asks for another split than the given one. A subset is the second argument of
    load_dataset.
    """
    path = Path(source).expanduser()
    head, colon, tail = source.rpartition(":")
    if colon and not path.exists():
        source, split, path = head, tail, Path(head).expanduser()
        if path.is_file():
            raise ValueError(f"{path} is a file, which has no split {split!r}")
    if path.is_file():
        tables = [read_file(path)]
    elif path.is_dir():
        tables = read_folder(path, split, subset)
    elif may_be_of_the_hub(source):
        tables = [load_dataset(source, split, subset)]
    else:
        raise ValueError(f"there is no file or folder {source!r}{seen_from_here()}")
    for table in tables:
        if not len(table.rows):
            raise ValueError(f"{table.name} has no rows")
    return tables


def seen_from_here() -> str:
    return f", seen from {os.getcwd()}"


def may_be_of_the_hub(source: str) -> bool:
    """Whether it is NAME or OWNER/NAME, and not the name of a file."""
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)
    return bool(is_name) and Path(source).suffix not in READERS


def read_file(path: Path) -> Table:
    if path.suffix not in READERS:
        raise ValueError(f"{path} is none of {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{path}: {describe(error)}") from error


def read_folder(path: Path, split: str, subset: str) -> list[Table]:
    """Its JSONL and parquet files of the split; else what the package datasets makes of it.

    Words of their paths say which split files are of; if none does, all are of the split "train".
    """
    files = sorted(file for suffix in (".jsonl", ".parquet") for file in path.rglob(f"*{suffix}"))
    if not files or was_saved(path):
        return [load_dataset(str(path), split, subset)]
    words = {file: set(re.split(r"[\W_]+", str(file.relative_to(path)))) for file in files}
    splits = set().union(*words.values()) & SPLITS or {"train"}
    found = [file for file in files if split in words[file]]
    if splits == {"train"} and split == "train":
        found = files
    if not found:
        raise ValueError(f"{path} has no .jsonl or .parquet file of the split {split!r}, but of "
                         f"{', '.join(sorted(splits))}: say {path}:SPLIT")
    return [read_file(file) for file in found]


# ---- JSON

def read_json(path: Path) -> Table:
    """A list of rows, or a row in each line."""
    content = path.read_bytes()
    if not content.lstrip().startswith(b"["):
        return read_jsonl(path)
    return Table(str(path), [as_row(row, f"{path}, row {number} (from 0)")
                             for number, row in enumerate(parsed(content, str(path)))], path.parent)


def read_jsonl(path: Path) -> Table:
    rows, lines = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                rows.append(as_row(parsed(line, where), where))
                lines.append(number)
    return Table(str(path), rows, path.parent, lines)


def parsed(content: bytes, where: str):
    try:
        return json.loads(content)
    except ValueError as error:  # of the encoding, too
        raise ValueError(f"{where}: it is no JSON: {error}") from error


def as_row(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, not {row!r:.80}")
    return row


# ---- parquet and the package datasets

def read_parquet(path: Path) -> Table:
    parquet = package("pyarrow.parquet", f"{path} is a parquet file")
    return Table(str(path), Parquet(path, parquet.ParquetFile), path.parent)


class Parquet(Sequence):
    """Rows of a parquet file. One row group is in memory, that of the row that was read last."""

    def __init__(self, path: Path, opened: Callable):
        self.path, self.opened = path, opened
        with self.whole():
            metadata = opened(path).metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = list(itertools.accumulate(sizes, initial=0))
        self.lock = threading.Lock()  # rows are read by many threads
        self.group, self.table = None, None

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = bisect.bisect_right(self.starts, index) - 1
        with self.lock, self.whole():
            if self.group != group:
                self.table = self.opened(self.path).read_row_group(group)
                self.group = group
            table = self.table
        return table.slice(index - self.starts[group], 1).to_pylist()[0]

    @contextlib.contextmanager
    def whole(self):
        """What fails in here fails because of the file."""
        try:
            yield
        except Exception as error:  # of any of pyarrow's types
            raise ValueError(f"{self.path} is no whole parquet file: {describe(error)}") from error


class Loaded(Sequence):
    """Rows of a datasets.Dataset as they are stored: images are not decoded."""

    def __init__(self, dataset):
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index].to_pylist()[0]


def was_saved(path: Path) -> bool:
    """Whether it is a folder that datasets' save_to_disk wrote."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def load_dataset(source: str, split: str, subset: str) -> Table:
    """What the package datasets makes of an id or folder."""
    if os.path.isdir(source):
        datasets = package("datasets", f"{source} is a folder without .jsonl and .parquet files")
    else:
        datasets = package("datasets", f"{source!r} is no file or folder{seen_from_here()}")
    try:
        if was_saved(Path(source)):
            dataset = datasets.load_from_disk(source)
            if isinstance(dataset, dict):
                dataset = dataset[split]
        else:
            dataset = datasets.load_dataset(source, subset or None, split=split)
    except Exception as error:  # networks, scripts and caches fail in any way
        raise ValueError(f"{source}, split {split!r}: {describe(error)}") from error
    return Table(f"{source}:{split}", Loaded(dataset), Path(source))


def package(name: str, why: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package_name = name.partition(".")[0]
        raise ValueError(f"{why}, for which the package {package_name} is needed: "
                         f"pip install {package_name}") from error


READERS = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}

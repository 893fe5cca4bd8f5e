"""Data sets of users, in each form that is accepted, and what is said about broken ones.

What needs pyarrow, datasets or math-verify runs in a Python environment that has them, as in
test_verifiers.py; without a registry of packages it is skipped. The metrics of the runs are added
to the file that DATASET_RESULTS names, if it does, and then every form is trained.
"""
import base64
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT, free_port, noise, processes_with
from envs import answers
from rollout import load_environment
from support import check
from support.prompts import row_prompt
from test_faults import command
from test_verifiers import environment, install

PICTURES = [noise(56, 56, 1), noise(84, 56, 2)]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, rows: list, name: str = "train.jsonl") -> str:
    """A JSONL file, beside which a.png and b.png lie."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for letter, picture in zip("ab", PICTURES):
        picture.save(folder / "pictures" / f"{letter}.png")
    (folder / name).write_text("".join(
        (row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(folder / name)


def load(train: str, **args):
    return load_environment("dataset", {"train": train, **args})


def shown(row: dict) -> list:
    """What the model is shown: (role, text) and the bytes of images, in order."""
    found = []
    for message in row_prompt(row):
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            is_text = part["type"] == "text"
            found.append((message["role"], part["text"]) if is_text else part["image"].tobytes())
    return found


# ---- forms

A, B = "pictures/a.png", "pictures/b.png"
FIRST, SECOND = [picture.tobytes() for picture in PICTURES]
PLAIN = [FIRST, ("user", "How many?")]
BYTES = {"bytes": png(PICTURES[0]), "path": "not-here.png"}
CONVENTIONS = {  # name -> (a row, args, what is shown of it)
    "geometry3k": ({"images": [A], "problem": "<image>How many?", "answer": "3"}, {}, PLAIN),
    "llava": ({"id": "1", "image": A, "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Shapes."},
        {"from": "human", "value": "How many?"}, {"from": "gpt", "value": "3"}]}, {},
        [FIRST, ("user", "\nWhat?"), ("assistant", "Shapes."), ("user", "How many?")]),
    "problem, answer, images": ({"problem": "How many?", "answer": 3, "images": [A]}, {}, PLAIN),
    "image, question, answer": ({"image": A, "question": "How many?", "answer": "3"}, {}, PLAIN),
    "messages": ({"messages": [{"role": "system", "content": "Count."},
                               {"role": "user", "content": "<image>How many?"},
                               {"role": "assistant", "content": "3"}], "images": [A]}, {},
                 [("system", "Count."), *PLAIN]),
    "prompt of messages, solution": ({"prompt": [{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": "How many?"}]}], "image": A,
        "solution": "3"}, {}, PLAIN),
    "prompt that is a text": ({"prompt": "How many?", "image": A, "answer": "3"}, {}, PLAIN),
    "images in the messages": ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": A}}, {"type": "text", "text": "How many?"}]}],
        "answer": "3"}, {}, PLAIN),
    "names of one's own": ({"pic": A, "q": "How many?", "a": "3"},
                           {"images": "pic", "question": "q", "answer": "a"}, PLAIN),
    "a folder of images": ({"file_name": A, "question": "How many?", "answer": "3"}, {}, PLAIN),
    "two images, in their places": (
        {"images": [A, B], "problem": "In <image> and <image>?", "answer": "3"}, {},
        [("user", "In "), FIRST, ("user", " and "), SECOND, ("user", "?")]),
    "two images, no place": ({"images": [B, A], "problem": "How many?", "answer": "3"}, {},
                             [SECOND, *PLAIN]),
    "a template, a system": (
        {"image": A, "question": "<image>How many?", "answer": "3", "options": ["1", 3]},
        {"template": "Look: {question}\n{options}\nSay \\boxed{}.", "system": "Count."},
        [("system", "Count."), ("user", "Look: "), FIRST,
         ("user", "How many?\nA. 1\nB. 3\nSay \\boxed{}.")]),
    "a template around parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}],
         "image": A, "answer": "3"}, {"template": "Look: {question}"},
        [FIRST, ("user", "Look: "), ("user", "How many?")]),
    "text alone": ({"question": "How many?", "answer": "3"}, {"images": ""},
                   [("user", "How many?")]),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_columns_of_each_convention_are_understood(tmp_path, name):
    row, args, wanted = CONVENTIONS[name]
    train = load(write(tmp_path, [row] * 3), reward="number", **args).train
    assert len(train) == 3 and train[2]["answer"] == "3"
    assert shown(train[2]) == wanted
    with pytest.raises(IndexError):
        train[3]


@pytest.mark.parametrize("source", [
    "data:image/png;base64," + base64.b64encode(png(PICTURES[0])).decode(),
    base64.b64encode(png(PICTURES[0])).decode(), {"path": A, "bytes": None}, [{"url": A}],
    [A, None]])
def test_an_image_in_any_form_is_seen(tmp_path, source):
    train = load(write(tmp_path, [{"image": source, "question": "How many?", "answer": 3}])).train
    assert shown(train[0]) == PLAIN


def test_files_of_json_and_folders_with_splits(tmp_path):
    row = CONVENTIONS["geometry3k"][0]
    for split, count in (("train-0", 2), ("train-1", 1), ("test", 3)):
        write(tmp_path / "set", [{**row, "answer": split}] * count, f"{split}.jsonl")
    found = load(str(tmp_path / "set"), eval=str(tmp_path / "set"), num_eval=2)
    assert [row["answer"] for row in found.train] == ["train-0", "train-0", "train-1"]
    assert [row["answer"] for row in found.eval] == ["test", "test"]
    named = load(f"{tmp_path / 'set'}:test")
    assert len(named.train) == 3 and len(named.eval) == 0
    write(tmp_path, [])
    for name, text in (("list.json", json.dumps([row, row])), ("lines.json", json.dumps(row)),
                       ("marked.jsonl", "\ufeff" + json.dumps(row) + "\n\n")):
        (tmp_path / name).write_text(text)
        assert shown(load(str(tmp_path / name)).train[0]) == PLAIN
    write(tmp_path / "plain", [row], "mine.jsonl")
    assert len(load(str(tmp_path / "plain")).train) == 1
    with pytest.raises(ValueError, match="no .jsonl or .parquet file of the split 'test', but"):
        load(str(tmp_path / "plain"), eval=str(tmp_path / "plain"))


def test_rows_of_the_file_stay_as_they_are_and_images_are_opened_late(tmp_path):
    rows = [CONVENTIONS["llava"][0], {**CONVENTIONS["llava"][0], "image": B}]
    train = load(write(tmp_path, rows)).train
    before = repr([table.rows for table, _ in train.places])
    (tmp_path / B).write_text("no image")
    assert len(shown(train[0])) == 4
    with pytest.raises(ValueError, match=r"train.jsonl, line 2, column `image`, image 0: cannot"):
        train[1]
    assert repr([table.rows for table, _ in train.places]) == before


# ---- what is broken

ROW = {"images": [A], "problem": "<image>How many?", "answer": "3"}


def chat(*messages):
    return {"images": [A], "messages": list(messages)}


USER = {"role": "user", "content": "<image>How many?"}
BROKEN = {  # name -> (the second of two rows, args, what is said)
    "an unreadable line": ('{"images": ["a.png"', {}, "line 2: it is no JSON"),
    "a row that is a list": ([1], {}, "line 2: a row must be an object, not \\[1\\]"),
    "no image file": ({**ROW, "images": ["c.png"]}, {}, "line 2, column `images`, image 0: there"),
    "a folder as image": ({**ROW, "images": ["pictures"]}, {}, "column `images`, image 0: there"),
    "a number as image": ({**ROW, "images": [3]}, {}, "column `images`, image 0: 3 is no image"),
    "pixels in a list": ({**ROW, "images": [[[0, 0, 0]]]}, {}, r"image 0: \[.* is no image"),
    "a dict without an image": ({**ROW, "images": [{"file": A}]}, {}, "image 0: it has none of"),
    "more places than images": ({**ROW, "problem": "<image><image>?"}, {},
                                "line 2, column `problem`: .* image number 2"),
    "places and no image": ({**ROW, "images": None}, {}, "column `problem`: .* image number 1"),
    "fewer places than images": ({**ROW, "images": [A, B]}, {},
                                 "line 2, column `problem`: .* 2 images .* shows 1"),
    "an empty question": ({**ROW, "problem": "<image> "}, {}, "`problem`: the question is empty"),
    "no question": ({**ROW, "problem": None}, {}, "`problem`: None is no text, and no list"),
    "another schema": ({"image": A, "question": "<image>?", "answer": "3"}, {},
                       "has the columns question and problem: say which one is meant, question = "),
    "an empty answer": ({**ROW, "answer": " "}, {}, "line 2, column `answer`: there is no answer"),
    "no answer": ({**ROW, "answer": None}, {}, "line 2, column `answer`: there is no answer"),
    "a row without the column": ({"images": [A], "problem": "<image>?"}, {}, "there is no answer"),
    "no number": ({**ROW, "answer": "none"}, {"reward": "number"},
                  "line 2, column `answer`: 'none' is not one number"),
    "no choice": ({**ROW, "answer": "3"}, {"reward": "choice"}, "line 1, .*one letter from A to J"),
    "an answer that is a list": ({**ROW, "answer": ["3"]}, {}, "column `answer`: .* not a text"),
    "a video": ({**ROW, "videos": ["a.mp4"]}, {}, "line 2, column `videos`: videos"),
    "a column of the template": (ROW, {"template": "{question} {options}"},
                                 "line 1, template: {options} must name a column"),
    "a template with the answer": (ROW, {"template": "{question} \\boxed{answer}"},
                                   "{answer} must name a column .* not the answer"),
    "a template without a question": (ROW, {"template": "Look"}, "must hold {question} once"),
    "an unknown reward": (ROW, {"reward": "exakt"}, "reward 'exakt' is none of exact, num"),
    "a reward of no module": (ROW, {"reward": "no_such:f"}, "No module named 'no_such'"),
    "no function": (ROW, {"reward": "own_rewards:f"}, "'own_rewards:f' cannot be imported: "),
    "a reward that fails": (ROW, {"reward": "own_rewards:fails"},
                            "line 1: a reward .fails. fails .* KeyError: 'board'"),
    "a reward that is none": (ROW, {"reward": "own_rewards:none"}, "line 1: a reward .none. fails"),
    "a reward of two": (ROW, {"reward": "own_rewards:two"}, "returned 2 rewards for 1 completion"),
    "a given column": (ROW, {"images": "pics"}, "has no column 'pics', but images, p"),
    "a given column of questions": (ROW, {"question": "pics"}, "has no column 'pics', but"),
    "an unknown key": (ROW, {"trian": "x"}, "unexpected keyword argument 'trian'"),
    "messages in one row alone": ({**chat("hello"), "answer": "3"}, {}, "say which one is meant"),
}
CHATS = {  # the same, where all rows are of chat messages
    "a message that is none": (chat("hello"), "`messages`: 'hello' is no message"),
    "no role": (chat({"content": "x"}, USER, {"role": "assistant", "content": "3"}), "has no role"),
    "no message": (chat(), r"`messages`: \[\] is no text, and no list"),
    "no answer": (chat(USER), "line 2, column `messages`: there is no answer"),
    "the system last": (chat({"role": "system", "content": "x"}), "must be one of the user"),
    "a part that is none": (chat({"role": "user", "content": [{"type": "video", "video": "x"},
                                                              {"type": "text", "text": "x"}]},
                                 {"role": "assistant", "content": "3"}), "of type 'video'"),
}


def said(action) -> str:
    with pytest.raises(ValueError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and text.startswith("environment 'dataset': ")
    return text


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rewards.py").write_text(OWN_REWARDS)
    yield
    sys.modules.pop("own_rewards", None)


OWN_REWARDS = """
calls = []

def fails(completion, answer, **info):
    raise KeyError("board")

def none(completion, answer, **info):
    return None

def two(completions, **columns):
    return [1.0, 2.0]

def own(completion, answer, level, **info):
    return 0.5 if (completion, answer, level) == ("3", "3", 7) else 0.0

def trl(prompts, completions, answer, level, **columns):
    calls.append((prompts, completions, answer, level, sorted(columns)))
    return [float(level[0])]

async def trl_async(completions, **columns):
    return [0.25 for completion in completions]
"""


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_is_one_line_with_file_row_and_column(tmp_path, own_rewards, name):
    row, args, wanted = BROKEN[name]
    path = write(tmp_path, [ROW, row])
    with pytest.raises(ValueError, match=wanted):
        load(path, **args)
    said(lambda: load(path, **args))


@pytest.mark.parametrize("name", CHATS)
def test_broken_messages_are_one_line(tmp_path, name):
    row, wanted = CHATS[name]
    path = write(tmp_path, [chat(USER, {"role": "assistant", "content": "3"}), row])
    with pytest.raises(ValueError, match=wanted):
        load(path)
    assert f"{path}, line 2, column `messages`" in said(lambda: load(path))


def test_files_that_are_none_are_one_line(tmp_path):
    write(tmp_path, [])
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "x\xff"}')
    (tmp_path / "empty").mkdir()
    for name, wanted in (("train.jsonl", "train.jsonl has no rows"),
                         ("no.jsonl", "there is no file or folder"),
                         ("table.csv", "table.csv is none of .jsonl, .json, .parquet"),
                         ("broken.json", "broken.json: it is no JSON"),
                         ("latin.jsonl", "line 1: it is no JSON: 'utf-8' codec can't decode"),
                         ("train.jsonl:test", "is a file, which has no split 'test'")):
        assert wanted in said(lambda: load(str(tmp_path / name)))
    assert "train must name a file" in said(lambda: load(""))


def test_pictures_that_no_column_names_are_not_left_out_in_silence(tmp_path):
    path = write(tmp_path, [{"picture": A, "question": "How many?", "answer": "3"}])
    assert "shows an image; its columns are picture, question, answer" in said(lambda: load(path))
    assert shown(load(path, images="picture").train[0]) == PLAIN


def test_a_row_that_lacks_its_image_is_found_where_no_text_says_that_it_has_one(tmp_path):
    row = {"image": A, "question": "How many?", "answer": "3"}
    path = write(tmp_path, [row, {**row, "image": None}])
    assert f"{path}, line 2, column `question`: the row has no image" in said(lambda: load(path))
    marked = {**row, "question": "<image>How many?"}
    path = write(tmp_path, [marked, {**row, "image": None}])
    assert shown(load(path).train[1]) == [("user", "How many?")]  # of a set that says it: a text


def test_a_run_on_broken_data_ends_in_one_line_and_stops_its_server(tmp_path):
    port = free_port()
    path = write(tmp_path, [ROW, {**ROW, "answer": None}])
    done = subprocess.run(
        [sys.executable, "train.py", "@", str(ROOT / "config.toml"), "env.id=dataset",
         f"env.args.train={path}", f"output_dir={tmp_path}/out", f"vllm_server_port={port}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120)
    deadline = time.monotonic() + 20
    while processes_with(f"--port {port}"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.splitlines()[-1] == (f"error: environment 'dataset': {path}, line 2, "
                                            "column `answer`: there is no answer")


def test_all_bad_rows_are_counted(tmp_path):
    path = write(tmp_path, [ROW, *[{**ROW, "answer": ""}] * 3])
    assert said(lambda: load(path)).endswith("(bad rows: 3)")


@pytest.mark.parametrize("picture, wanted", [
    (Image.new("CMYK", (56, 56)), (255, 255, 255)),
    (Image.new("I;16", (56, 56), 65535), (255, 255, 255)),
    (Image.new("LA", (56, 56), (0, 0)), (255, 255, 255)), (Image.new("1", (1, 1)), (0, 0, 0)),
    (Image.new("P", (56, 56)), (0, 0, 0))])
def test_images_of_other_modes_are_seen_as_they_are(tmp_path, picture, wanted):
    path = write(tmp_path, [{**ROW, "images": ["odd.tiff"]}])
    picture.save(tmp_path / "odd.tiff")
    image = load(path).train[0]["prompt"][0]["content"][0]["image"]
    assert image.mode == "RGB" and image.getpixel((0, 0)) == wanted


# ---- rewards

@pytest.mark.parametrize("name, answer, right, wrong", [
    ("exact", "a cat", ["a cat", " a cat\n", "<think>dog</think>\\boxed{a cat}",
                        "so <answer> a cat </answer>", "<answer>\\boxed{a cat}</answer>"],
     ["A cat", "a cat.", "", "\\boxed{a cat", "a cat \\boxed{dog}"]),
    ("number", "-1,200.50", ["-1200.5", "it is 3, no: -1200.50.", "\\boxed{-1.2005e3}",
                             "\u22121200.5", "-2401/2"],
     ["1200.5", "", "none", "-1200.5 or 7", "-1200.51", "1/0", "5-1200.5"]),
    ("number", "3/4", ["0.75", "3 / 4", "x = .75"], ["4", "1/4", "3"]),
    ("choice", "(B)", ["B", "(B)", "The answer is B.", "<think>A or C</think>B", "\\boxed{B}"],
     ["A", "A or B", "", "b", "CAB", "A triangle, so B"]),
    ("json", '{"x": [1, 2]}', ['{"x": [1,2]}', '```json\n{"x": [1, 2.0]}\n```'],
     ["{'x': [1, 2]}", '{"x": [1]}', "", "[]"]),
])
def test_named_rewards(name, answer, right, wrong):
    reward = answers.find_reward(name)
    assert [reward(text, answer) for text in right] == [1.0] * len(right)
    assert [reward(text, answer) for text in wrong] == [0.0] * len(wrong)


def test_rewards_of_ones_own_are_given_the_columns(tmp_path, own_rewards):
    path = write(tmp_path, [{**ROW, "level": 7}])
    found = load(path, weights=[1.0, 10.0, 4.0],
                 reward=["own_rewards:own", "own_rewards:trl", "own_rewards:trl_async"])
    import own_rewards
    own_rewards.calls.clear()
    from support.rewards import scores
    row = found.train[0]
    total, each = scores(found, "3", row["answer"], row["info"])
    assert each == {"own": 0.5, "trl": 7.0, "trl_async": 0.25} and total == 71.5
    assert own_rewards.calls == [(["<image>How many?"], ["3"], ["3"], [7], ["problem"])]


def test_rewards_of_trl_are_given_messages_where_the_data_set_has_them(tmp_path, own_rewards):
    path = write(tmp_path, [{"prompt": [USER], "images": [A], "answer": "3", "level": 1}])
    load(path, reward="own_rewards:trl")
    import own_rewards
    [(prompts, completions, *_)] = own_rewards.calls
    assert prompts == [[USER]] and completions == [[{"role": "assistant", "content": "3"}]]


def test_json_answers_may_be_tables(tmp_path):
    found = load(write(tmp_path, [{**ROW, "answer": {"x": [1]}}]), reward="json")
    assert found.rewards[0]('{"x": [1]}', found.train[0]["answer"]) == 1


# ---- the look at rows, before anything is trained

def test_rows_are_shown_as_the_model_sees_them(tmp_path, capsys, monkeypatch):
    path = write(tmp_path, [{**ROW, "answer": str(number)} for number in range(5)])
    words = ["check", "@", str(ROOT / "config.toml"), "env.id=dataset", f"env.args.train={path}",
             "env.args.reward=number", "env.args.template={question} Say a number."]
    monkeypatch.setattr(sys, "argv", words)
    assert check.main(words[1:]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("----")] == [
        f"---- train, row {number} of 5 (from 0)" for number in (0, 2, 4)]
    assert lines[4] == ("  <|vision_start|><|image_pad|><|vision_end|>How many? Say a number."
                        "<|im_end|>")
    assert lines[6] == "images: 1, of 56 x 56 pixels"
    assert lines[7].startswith("tokens: ") and lines[8] == "answer: 0"
    assert lines[9] == "reward of the answer itself: 1 (number 1)"
    tokens = lines[7].split(";")[0].replace(",", "").split()
    assert int(tokens[1]) == int(tokens[2]) + 3  # four patches of 28 x 28


def test_what_the_model_reads_as_an_image_is_found_in_any_row(tmp_path, capsys, monkeypatch):
    rows = [ROW] * 9
    rows[7] = {**ROW, "problem": "<image>What is <|image_pad|>?"}
    path = write(tmp_path, rows)
    words = ["check", "@", str(ROOT / "config.toml"), "env.id=dataset", f"env.args.train={path}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        check.main(words[1:])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}, line 8, column `problem`: message 0 quotes")


# ---- what needs further packages, and training

def python() -> str:
    """One that has pyarrow, datasets and math-verify."""
    found = environment("5.2.0", "datasets")
    if subprocess.run([found, "-c", "import math_verify"], stderr=subprocess.DEVNULL).returncode:
        install(found, "math-verify[antlr4_13_2]==0.9.0")
    return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What dataset_cases.py found, by case."""
    folder = tmp_path_factory.mktemp("sets") / "forms"
    done = subprocess.run([python(), "tests/dataset_cases.py", folder], cwd=ROOT, check=True,
                          text=True, stdout=subprocess.PIPE, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {line["case"]: line for line in lines}


FORMS = {"jsonl, LLaVA": 0, "json, messages": 0, "folder of images, metadata.jsonl": 0,
         "parquet, Geometry3K": 0, "folder of parquet, splits": 8,
         "load_dataset, image/question/answer": 0, "save_to_disk, prompt of messages": 8}


def test_every_form_gives_the_same_rows(cases):
    """Pixels, questions and answers are those that were written, in their order."""
    assert cases["forms"]["found"].keys() == FORMS.keys()
    for form, held_out in FORMS.items():
        assert cases[form]["found"] == [[True, True, True]] * 8, form
        assert cases[form]["eval"] == held_out


def test_broken_parquet_is_one_line_with_file_row_and_column(cases):
    wanted = {
        "a parquet file that is cut": "cut.parquet is no whole parquet file: ArrowInvalid",
        "a parquet file of other bytes": "changed-bytes.parquet is no whole parquet file: ",
        "a broken image": "row 3 (from 0), column `images`, image 0: cannot read image",
        "a place too many": "row 3 (from 0), column `problem`: message 0, part 0: cannot read",
        "no answer": "row 4 (from 0), column `answer`: there is no answer",
        "numbers as images": "row 0 (from 0), column `images`, image 0: 0 is no image (bad",
        "a split that is not there": "saved, split 'validation': KeyError: 'validation'",
        "a file that is none": "there is no file or folder"}
    found = cases["broken"]["found"]
    assert found.keys() == wanted.keys()
    for name, words in wanted.items():
        assert words in found[name] and "\n" not in found[name], name


def test_math_is_compared_as_math_and_what_never_ends_is_not_right(cases):
    found = cases["math"]["found"]
    assert found["2 \\sqrt { 221 }"] == [1, 1, 1, 0]
    assert found["\\frac { 3 } { 5 }"] == [1, 1, 0, 0] and found["36"] == [1, 1, 0, 0]
    assert found["endless"] == 0 and 1.5 < found["seconds"] < 30 and found["afterwards"] == 1
    assert "nothing that math-verify can read" in found["unreadable"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for name in ("pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").touch()
    (tmp_path / "folder").mkdir()
    for source, wanted in (("a.parquet", "is a parquet file, for which the package pyarrow is n"),
                           ("folder", "is a folder without .jsonl and .parquet files, for whi")):
        assert wanted in said(lambda: load(str(tmp_path / source)))
    assert "'someone/name' is no file or folder, seen from" in said(lambda: load("someone/name"))


def train(server, folder: Path, config: str, form: str, options: dict) -> list[dict]:
    """The metrics of two steps of `python train.py`."""
    words = command(server, run_name="own-data", output_dir=folder, max_steps=2, async_steps=0,
                    batch_size=32, rollouts_per_step=4, **options)
    words[3] = str(ROOT / config)
    subprocess.run([python(), *words[1:]], cwd=ROOT, check=True, timeout=300,
                   env=os.environ | {"PYTHONPATH": str(ROOT / "tests")})
    lines = (folder / "own-data" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    if "DATASET_RESULTS" in os.environ:
        with open(os.environ["DATASET_RESULTS"], "a") as file:
            file.writelines(json.dumps({"form": form, "config": config, **step}) + "\n"
                            for step in steps)
    return [step for step in steps if "loss" in step]


@pytest.mark.parametrize("form", FORMS if "DATASET_RESULTS" in os.environ else ["jsonl, LLaVA"])
def test_data_of_ones_own_is_trained_on(server, cases, tmp_path, form):
    options = {f"env.args.{name}": value for name, value in cases["forms"]["found"][form].items()}
    steps = train(server, tmp_path, "config.toml", form, {
        "env.id": "dataset", "eval_every_steps": 0,
        "env.args.template": "{question} Answer with one word.", **options})
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["dropped"] == 0 and step["kl"] < 1e-6
        assert 0 < step["reward"] == step["reward/exact"] < 1 and step["grad_norm"] > 0


def test_the_config_for_geometry3k_trains_on_its_schema(server, cases, tmp_path):
    """Its hub's folder of parquet, its template and reward; the model is the tiny one."""
    folder = cases["forms"]["found"]["folder of parquet, splits"]["train"]
    steps = train(server, tmp_path, "configs/geometry3k-qwen2.5-vl-7b.toml", "its schema", {
        "env.args.train": folder, "env.args.eval": f"{folder}:test", "env.args.num_eval": 4,
        "env.args.reward": '["math", "dataset_cases:brevity"]', "max_tokens": 8,
        "inference.args.max_model_len": 512, "inference.args.data_parallel_size": 1,
        "inference.gpus": 0, "trainer.gpus": 0, "eval_every_steps": 1, "save_every_steps": 0,
        "inference.args.enforce_eager": "true", "inference.args.dtype": "float32"})
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["dropped"] == 0 and step["kl"] < 1e-6 and step["grad_norm"] > 0
        assert step["reward"] == pytest.approx(step["reward/math"] + step["reward/brevity"])

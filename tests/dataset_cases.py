"""What needs pyarrow, datasets and math-verify; run by test_dataset.py in a Python that has them.

`python tests/dataset_cases.py FOLDER` makes a data set in every form there, loads each, breaks some
of them, and prints a line of JSON for each case.
"""
import io
import json
import sys
import time
from pathlib import Path

ROWS = 8


def brevity(completions, **columns):
    """A reward as TRL has it."""
    return [1 / (1 + len(text)) for text in completions]


def drawings() -> list[dict]:
    """The rows of envs/colors.py by columns; their images are PNGs."""
    from envs.colors import Drawings
    found = []
    for row in Drawings(7, "train", ROWS):
        image, question = row["prompt"][0]["content"]
        buffer = io.BytesIO()
        image["image"].save(buffer, "PNG")
        found.append({"png": buffer.getvalue(), "question": question["text"],
                      "answer": row["answer"]})
    return found


def make_forms(folder: Path) -> dict[str, dict]:
    """{form: env.args} of the same rows."""
    import datasets
    import pyarrow
    from pyarrow import parquet
    rows = drawings()
    (folder / "pictures").mkdir(parents=True)
    for number, row in enumerate(rows):
        row["path"] = f"pictures/{number}.png"
        (folder / row["path"]).write_bytes(row["png"])

    def lines(path: Path, rows: list[dict]) -> str:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    forms = {"jsonl, LLaVA": {"train": lines(folder / "llava.jsonl", [
        {"id": row["path"], "image": row["path"], "conversations": [
            {"from": "human", "value": "<image>\n" + row["question"]},
            {"from": "gpt", "value": row["answer"]}]} for row in rows])}}
    (folder / "messages.json").write_text(json.dumps([
        {"images": [row["path"]], "messages": [
            {"role": "user", "content": "<image>" + row["question"]},
            {"role": "assistant", "content": row["answer"]}]} for row in rows]))
    forms["json, messages"] = {"train": str(folder / "messages.json")}
    lines(folder / "metadata.jsonl", [
        {"file_name": row["path"], "question": row["question"], "answer": row["answer"]}
        for row in rows])
    (folder / "images").mkdir()
    (folder / "images" / "pictures").symlink_to(folder / "pictures")
    (folder / "metadata.jsonl").rename(folder / "images" / "metadata.jsonl")
    forms["folder of images, metadata.jsonl"] = {"train": str(folder / "images")}

    geometry = pyarrow.Table.from_pylist([
        {"images": [{"bytes": row["png"], "path": None}], "problem": "<image>" + row["question"],
         "answer": row["answer"]} for row in rows])
    (folder / "hub").mkdir()
    parquet.write_table(geometry, folder / "geometry.parquet", row_group_size=3)
    forms["parquet, Geometry3K"] = {"train": str(folder / "geometry.parquet")}
    for split in ("train", "test"):
        parquet.write_table(geometry, folder / "hub" / f"{split}-00000-of-00001.parquet")
    forms["folder of parquet, splits"] = {"train": str(folder / "hub"), "eval": str(folder / "hub")}

    (folder / "table").mkdir()
    datasets.Dataset.from_list([
        {"image": "../" + row["path"], "question": row["question"], "answer": row["answer"]}
        for row in rows]).to_csv(
        folder / "table" / "train.csv")
    forms["load_dataset, image/question/answer"] = {"train": str(folder / "table")}
    saved = datasets.Dataset.from_list([
        {"image": str(folder / row["path"]), "solution": row["answer"], "prompt": [
            {"role": "user", "content": [{"type": "image", "text": None},
                                         {"type": "text", "text": row["question"]}]}]}
        for row in rows]).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(folder / "saved")
    forms["save_to_disk, prompt of messages"] = {"train": str(folder / "saved"),
                                                 "eval": str(folder / "saved")}
    return forms


def said(train, **args) -> str:
    """The error of a data set, or of its fourth row."""
    from rollout import load_environment
    try:
        load_environment("dataset", {"train": str(train), **args}).train[3]
    except ValueError as error:
        return str(error)
    return "nothing"


def break_files(folder: Path) -> dict[str, str]:
    """{what is broken: what is said}."""
    import pyarrow
    from pyarrow import parquet
    table = parquet.read_table(folder / "geometry.parquet")

    def changed(name: str, values: list) -> Path:
        path = folder / "changed.parquet"
        column = pyarrow.array(values)
        at = table.column_names.index(name)
        parquet.write_table(table.set_column(at, name, column), path, row_group_size=3)
        return path

    content = (folder / "geometry.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(content[:-20])
    (folder / "changed-bytes.parquet").write_bytes(content[:4] + bytes(2000) + content[2004:])
    images, problems, answers = [table[name].to_pylist()
                                 for name in ("images", "problem", "answer")]
    images[3] = [{"bytes": b"no image", "path": None}]
    problems[3] += "<image>"
    answers[4] = None
    return {
        "a parquet file that is cut": said(folder / "cut.parquet"),
        "a parquet file of other bytes": said(folder / "changed-bytes.parquet"),
        "a broken image": said(changed("images", images)),
        "a place too many": said(changed("problem", problems)),
        "no answer": said(changed("answer", answers)),
        "numbers as images": said(changed("images", list(range(ROWS)))),
        "a split that is not there": said(folder / "saved:validation"),
        "a file that is none": said(folder / "no.parquet")}


def compare() -> dict:
    """What math-verify says of pairs of answer and completion."""
    from envs import answers, math_worker
    math_worker.SECONDS = 2
    pairs = {"2 \\sqrt { 221 }": ["\\boxed{2\\sqrt{221}}", "it is $\\sqrt{884}$",
                                 "2 \\sqrt { 221 }", "\\boxed{29}"],
             "\\frac { 3 } { 5 }": ["\\boxed{0.6}", "3/5", "\\boxed{\\frac{5}{3}}", "none"],
             "36": ["x = 36", "\\boxed{36.0}", "<think>36</think>\\boxed{37}", ""]}
    found = {answer: [answers.math(text, answer) for text in texts]
             for answer, texts in pairs.items()}
    start = time.monotonic()
    found["endless"] = answers.math("\\boxed{9^{9^{9^9}}}", "48")
    found["seconds"] = time.monotonic() - start
    found["afterwards"] = answers.math("\\boxed{48}", "48")
    try:
        answers.math("x", "")
    except ValueError as error:
        found["unreadable"] = str(error)
    return found


def main(folder: Path) -> None:
    from rollout import load_environment
    from support.messages import render_prompt
    forms = make_forms(folder)
    print(json.dumps({"case": "forms", "found": forms}))
    for form, args in forms.items():
        environment = load_environment("dataset", args)
        rows = []
        for row, drawn in zip(environment.train, drawings(), strict=True):
            _, [image] = render_prompt(row["prompt"])
            texts = [part["text"] for message in row["prompt"] for part in message["content"]
                     if part["type"] == "text"]
            same = image.tobytes() == open_png(drawn["png"]).tobytes()
            rows.append([same, "".join(texts).strip() == drawn["question"],
                         row["answer"] == drawn["answer"]])
        print(json.dumps({"case": form, "found": rows, "eval": len(environment.eval)}))
    print(json.dumps({"case": "broken", "found": break_files(folder)}))
    print(json.dumps({"case": "math", "found": compare()}))


def open_png(content: bytes):
    from PIL import Image
    return Image.open(io.BytesIO(content)).convert("RGB")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(Path(sys.argv[1]))

"""The report of a run: what is shown, by which rule, and what no file of the run can do to it."""
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from conftest import canned, make_trainer, noise
from support import report
from support.charts import bar, chart, thinned

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "</div><script>document.title = 'owned'</script><img src=x onerror=\"alert('owned')\">"


def group(**change) -> dict:
    return {"place": 0, "prompt": "What color?", "answer": "red", "images": ["7-image-0.png"],
            "completions": [said("red", 1.0, 0.75), said("blue", 0.0, -0.25)], **change}


def said(text: str, reward: float, advantage: float, *later: dict) -> dict:
    return {"turns": [{"policy": text}, *later], "reward": reward, "rewards": {"exact": reward},
            "advantage": advantage, "finish_reason": "stop"}


def make_run(folder, groups: dict[int, dict[str, dict]], metrics: str | None = None):
    """A run's folder, of {step: {example: group}}; each step has one image, red."""
    folder.mkdir(exist_ok=True)
    if metrics is None:
        metrics = "".join(f'{{"step": {step}, "reward": {step / 100}}}\n' for step in groups)
    (folder / "metrics.jsonl").write_text(metrics)
    for step, examples in groups.items():
        place = folder / "rollouts" / f"step-{step}"
        place.mkdir(parents=True)
        Image.new("RGB", (56, 84), "red").save(place / "7-image-0.png")
        for name, entry in examples.items():
            (place / f"{name}.json").write_text(json.dumps(entry))
    return folder


def page(folder) -> str:
    return report.write(folder).read_text()


def test_a_training_leaves_a_report_of_its_first_and_last_step(tmp_path):
    """Of a conversation of two turns, whose second picture is not lost; without a server."""
    trainer = make_trainer(output_dir=str(tmp_path), max_steps=2)
    outputs = canned(trainer, [([noise(56, 56)], [3, 5], [[noise(84, 56, 1)]]), ([], [4, 2])])
    trainer.roll_out, trainer.send_weights, trainer.checked = lambda: outputs, lambda: None, True
    trainer.train()
    text = (tmp_path / "run" / "report.html").read_text()
    assert re.findall(r"<h3>(.*)</h3>", text) == [
        f"Step {step}, example {example}" for step in (1, 2) for example in (0, 1)]
    assert text.count('width="112" height="112" alt="0-image-0.png"') == 2
    assert text.count('width="84" height="56" alt="0-0-0-image-0.png"') == 2
    assert ">reward, mean 0.5<" in text and ">0.5</text>" in text and ">-0.5</text>" in text
    assert "And now?" in text and "<b>" not in text
    written = json.loads((tmp_path / "run" / "rollouts" / "step-1" / "1.json").read_text())
    assert written["place"] == 1 and written["completions"][1]["rewards"] == {"accuracy": 0.0}


def test_a_report_that_fails_is_one_line_and_the_run_ends_well(tmp_path, capsys, monkeypatch):
    trainer = make_trainer(output_dir=str(tmp_path))
    monkeypatch.setattr(report, "page", lambda folder: 1 / 0)
    trainer.records.open(None)
    trainer.records.write_report()
    assert capsys.readouterr().out == (
        "report.html could not be written: ZeroDivisionError: division by zero\n")


def test_steps_are_chosen_by_their_place_alone(tmp_path):
    assert report.chosen(list(range(10, 810, 10))) == [10, 210, 410, 600, 800]
    assert report.chosen([3]) == [3] and report.chosen([3, 4]) == [3, 4] and report.chosen([]) == []
    steps = {step: {"7": group(place=8), "12": group()} for step in (1, 9, 10, 20, 30, 100)}
    text = page(make_run(tmp_path / "run", steps))
    assert re.findall(r"<h3>(.*)</h3>", text)[:4] == [  # in the order of prompts, not of names
        "Step 1, example 12", "Step 1, example 7", "Step 9, example 12", "Step 9, example 7"]
    assert "Shown are steps 1, 9, 10, 30, 100: of the 6 that were logged" in text
    assert "Nothing is chosen by reward or looks." in text


def test_text_of_policy_and_environment_is_escaped_everywhere(tmp_path):
    reply = {"environment": EVIL, "images": [EVIL]}
    evil = group(prompt=EVIL, answer=EVIL, images=[EVIL],
                 completions=[said(EVIL + "x" * 500, 1.0, 0.0, reply, {"anew": EVIL, "images": []})])
    evil["completions"][0]["rewards"] = {EVIL: 1.0, "b": 0.0}
    metrics = json.dumps({"step": 1, EVIL: 1.0}) + "\n"
    text = page(make_run(tmp_path / "<b>&", {1: {"<u>": evil}}, metrics))
    assert not any(tag in text for tag in ("<script", "<img", "<b>", "<u>"))
    # Name of an image twice, prompt, answer, score, chart twice; folded: policy, reply, anew.
    assert text.count("&lt;script&gt;") == 7 + 2 * 3
    assert "<h3>Step 1, example &lt;u&gt;</h3>" in text and "<title>&lt;b&gt;&amp;</title>" in text
    assert "default-src 'none'; img-src data:" in text and "http://" not in text.replace(
        'xmlns="http://www.w3.org/2000/svg"', "")


def test_bars_say_rewards_and_advantages():
    assert '<rect x="0.0" width="40.0"' in bar(0.5, 0, 1, report.REWARD)
    below = bar(-0.25, -0.75, 0.75, report.ADVANTAGE)
    assert '<rect x="26.7" width="13.3"' in below and report.ADVANTAGE[0] in below
    assert ">-0.25</text>" in below and bar(None, 0, 1, report.REWARD) == "not finite"
    assert 'width="0.0"' in bar(0.0, 0, 0, report.REWARD)


def test_numbers_that_are_not_finite_leave_a_gap_in_the_curve():
    curve = chart({"kl": [(1, 1e-3), (2, None), (3, 0.0), (4, 1e-1), (5, 1e-2)]}, "KL", log=True)
    lines = re.findall(r'polyline points="(.*?)"', curve)
    assert [line.count(",") for line in lines] == [1, 2]
    assert "kl: 0.01" in curve and ">0.001</text>" in curve and ">0.1</text>" in curve
    assert "no finite value" in chart({"kl": [(1, None)]}, log=True)
    assert 'points="50.0,' in chart({"reward": [(0, 1.0)]})


def test_thousands_of_steps_keep_their_peaks():
    points = [(step, 5.0 if step == 7777 else 1.0) for step in range(20_000)]
    points[3] = (3, None)
    kept = thinned(points)
    assert len(kept) <= 600 and (7777, 5.0) in kept and sum(v is None for _, v in kept) == 1
    assert kept == sorted(kept, key=lambda point: point[0])


def test_broken_files_of_a_killed_run_cost_their_line_alone(tmp_path):
    metrics = ('{"step": 1, "reward": 0.5, "kl": null, "note": "x"}\n{"step": 2, "reward": NaN}\n'
               '[1]\n{"reward": 1}\n{"step": 3, "reward": 0.25}\n{"step": 4, "rew\xe9')
    folder = make_run(tmp_path / "run", {1: {"7": group()}, 2: {"8": group(completions=None)}},
                      metrics)
    place = folder / "rollouts" / "step-1"
    (place / "9.json").write_text('{"place": 3, "pro')
    (place / "10.json").write_text("[]")
    (place / "7-image-0.png").write_bytes(b"\x89PNG cut")
    (folder / "rollouts" / "step-x").mkdir()
    found, unread = report.read_metrics(folder / "metrics.jsonl")
    assert found == {"reward": {1: 0.5, 2: None, 3: 0.25}, "kl": {1: None}} and unread == 3
    text = page(folder)
    assert "<p>3 steps.</p>" in text and "cannot be read: 3.</p>" in text
    assert "training: 0.25" in text and "kl: no finite value" in text
    assert "7-image-0.png cannot be read" in text and ">blue</div>" in text
    assert [f"{name}.json cannot be read" in text for name in (7, 8, 9, 10)] == [
        False, True, True, True]


def test_a_run_without_rollouts_or_metrics_has_a_report_and_no_run_has_none(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="run: no run, for it has neither metrics.jsonl nor"):
        report.write(tmp_path / "run")
    text = page(make_run(tmp_path / "run", {}))
    assert "None has been written yet" in text and "None has been logged yet" in text
    make_run(tmp_path / "run", {5: {"7": group()}})
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "Step 5, example 7" in page(tmp_path / "run")


def test_rollouts_of_before_a_resume_are_not_taken_for_the_runs(tmp_path):
    text = page(make_run(tmp_path / "run", {2: {"7": group()}, 4: {"7": group()}},
                         '{"step": 3, "reward": 1.0}\n'))
    assert re.findall(r"<h3>(.*)</h3>", text) == ["Step 2, example 7"]
    assert "Steps [4] are of before the run was resumed" in text


def test_the_page_stays_small_however_much_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOM", 200_000)
    reply = {"environment": "seen" * 5000, "images": ["7-image-0.png"]}
    large = group(completions=[said("word " * 9000, 1.0, 0.0, reply) for _ in range(20)])
    folder = make_run(tmp_path / "run", {step: {"7": large} for step in range(1, 301)})
    for step in report.chosen(list(range(1, 301))):
        noise(200, 100).save(folder / "rollouts" / f"step-{step}" / "7-image-0.png")
    text = page(folder)
    assert len(text) < 300_000 and text.count("<h3>") == 5
    assert "[... 36999 characters ...]" in text and text.count(report.LEFT_OUT) > 50


def test_images_of_other_shapes_are_shown_whole(tmp_path):
    folder = make_run(tmp_path / "run", {1: {"7": group(images=["a.png", "b.png", "c.png"])}})
    for name, image in (("a", Image.new("L", (3000, 1000))), ("b", Image.new("RGBA", (1, 1))),
                        ("c", Image.new("P", (2, 4000)))):
        image.save(folder / "rollouts" / "step-1" / f"{name}.png")
    sizes = re.findall(r'<img.*?width="(\d+)" height="(\d+)" alt="(.)', page(folder))
    assert sizes == [("336", "112", "a"), ("112", "112", "b"), ("1", "336", "c")]


def test_placeholders_of_an_image_are_counted_and_long_texts_folded():
    room = report.Room(None, 10_000)
    assert room.text("<|image_pad|>" * 64 + "hi", "policy") == (
        '<div class="text policy">&lt;|image_pad|&gt; x 64 hi</div>')
    shown = room.text("<|im_start|>user\n" + "a" * 500, "policy")
    assert shown.startswith('<details class="policy"><summary>user aaa') and "a" * 500 in shown


def test_groups_go_to_weights_and_biases_as_a_table(tmp_path, monkeypatch):
    """Whole: a row per completion, and its own pictures in it."""
    wandb = SimpleNamespace(Image=lambda path: path, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trainer, sent = make_trainer(output_dir=str(tmp_path)), []
    trainer.records.wandb = SimpleNamespace(log=lambda entry, step: sent.append((step, entry)))
    outputs = canned(trainer, [([noise(56, 56)], [3, 5], [[noise(84, 56, 1)]])])
    trainer.build_batch(outputs)
    trainer.records.write_rollouts(4, outputs, trainer.tokenizer)
    [(step, entry)] = sent
    columns, rows = entry["rollouts"]
    folder = tmp_path / "run" / "rollouts" / "step-4"
    assert step == 4 and len(rows) == 2 and {len(row) for row in rows} == {len(columns)}
    assert rows[1][2] == [str(folder / "0-image-0.png")]
    assert rows[1][4] == [str(folder / "0-1-0-image-0.png")]
    assert (folder / "0-1-0-image-0.png").exists() and "environment: " in rows[1][3]
    assert rows[0][5:] == [1.0, 0.5, "stop"] and rows[1][5:] == [0.0, -0.5, "stop"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_shows_the_picture_and_runs_no_script(tmp_path):
    evil = group(completions=[said(EVIL, 1.0, 0.5), said("blue", 0.0, -0.5)])
    path = report.write(make_run(tmp_path / "run", {1: {"7": evil}}))
    options = ["--headless", "--disable-gpu", "--window-size=1000,1600",
               f"--user-data-dir={tmp_path / 'profile'}"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")

    def browse(*more: str) -> str:
        return subprocess.run([BROWSER, *options, *more, path.as_uri()], check=True, timeout=60,
                              capture_output=True, text=True).stdout

    assert "<title>run</title>" in browse("--dump-dom")
    browse(f"--screenshot={tmp_path / 'shot.png'}")
    pixels = Image.open(tmp_path / "shot.png").convert("RGB")
    colors = {color: count for count, color in pixels.getcolors(2**24)}
    assert colors[(255, 0, 0)] == 56 * 84  # the image
    assert colors[(0x1b, 0x6c, 0xa8)] > 1000 and colors[(0xb0, 0x41, 0x3e)] > 400  # the bars

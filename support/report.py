"""report.html of a run: its curves, and whole groups as pictures, in one file without network.

    python -m support.report outputs/colors

A training writes it at its end, and the command at any time, also for a run that was killed. It is
made of metrics.jsonl and rollouts/ alone. What is shown is chosen by rule, and the page says it.
"""
import base64
import html
import io
import json
import math
import re
import sys
from pathlib import Path

from PIL import Image

from support.charts import Points, bar, chart
from support.config import mistakes
from support.images import load_image

NAME = "report.html"
STEPS = 5            # whose groups are shown
ROOM = 6 * 2**20     # bytes for the texts and images of all groups together
TEXT = 8000          # characters that are shown of a text, at most
LONG = {"prompt": 400, "policy": 400, "environment": 60}  # from how many on a text is folded
SIDE, SMALL = 336, 112  # pixels: larger images are made smaller, and smaller ones shown larger
ADVANTAGE, REWARD = ("#b0413e", "#2a9d8f"), ("#1b6ca8", "#1b6ca8")  # of bars below 0, and above
LEFT_OUT = "<i>left out, for the page is full</i>"
REPEATED = re.compile(r"(<[^<>\s]{1,40}>|\[[A-Z_]{1,40}\])\1{2,}")  # an image's placeholders
SPECIAL = re.compile(r"<\|[^<>|]{1,40}\|>")  # tokens that the first words of a text go without

CHARTS = {  # title: {metric: label}; the axis of kl is logarithmic
    "Reward": {"reward": "training", "eval/reward": "held out"},
    "Mismatch KL, logarithmic": {"kl": "kl"},
    "Entropy": {"ent": "ent"},
    "Tokens of a completion": {"completion_length": "mean", "completion_length_max": "longest"},
    "Seconds of a step": {"seconds_rollout": "rollout", "seconds_train": "train",
                          "seconds_sync": "sync", "seconds_waited": "waited"},
    "Gradient norm": {"grad_norm": "grad_norm"}}

# No script runs and nothing is fetched, even if a completion found a way out of its text.
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>%s</title><style>
body { font: 14px sans-serif; margin: 24px; color: #222 }
h2 { margin-top: 32px } h3 { margin: 24px 0 8px }
table { border-collapse: collapse; margin-top: 8px }
th { text-align: left; font-weight: normal; color: #777; white-space: nowrap }
td, th { padding: 4px 12px 4px 0; vertical-align: top; border-top: 1px solid #eee }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 80em }
.turns { display: flex; flex-wrap: wrap; gap: 4px 10px }
.policy { font-weight: bold } .environment, .prompt, .note { color: #777; font-size: 11px }
.turn .environment { max-width: 11em } .turn img { max-height: 84px; width: auto }
img { vertical-align: top; margin: 0 4px 4px 0 } img.small { image-rendering: pixelated }
summary { cursor: pointer }
</style></head><body>
"""


def write(folder: Path) -> Path:
    """Write report.html into a run's folder; its path. ValueError if there is no run in it."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in ("metrics.jsonl", "rollouts")):
        raise ValueError(f"{folder}: no run, for it has neither metrics.jsonl nor rollouts/")
    path = folder / NAME
    path.write_text(page(folder), encoding="utf-8", errors="replace")
    return path


def page(folder: Path) -> str:
    name = html.escape(folder.resolve().name)
    metrics, unread = read_metrics(folder / "metrics.jsonl")
    last = max((step for points in metrics.values() for step in points), default=None)
    parts = [HEAD % name, f"<h1>{name}</h1>", "<h2>Metrics</h2>"]
    parts.append(f"<p>{last} steps.</p>" if metrics else "<p>None has been written yet.</p>")
    if unread:
        parts.append(f"<p>Lines of metrics.jsonl that cannot be read: {unread}.</p>")
    rest = {metric: {metric: metric} for metric in metrics if metric not in
            {shown for labels in CHARTS.values() for shown in labels}}
    parts += [draw(metrics, CHARTS), "<details><summary>All other metrics</summary>",
              draw(metrics, rest), "</details>", "<h2>Groups</h2>"]

    logged = logged_steps(folder)
    later = [step for step in logged if last is not None and step > last]
    if later:
        parts.append(f"<p>Steps {later} are of before the run was resumed, and not shown.</p>")
    steps = chosen([step for step in logged if step not in later])
    if not steps:
        return "\n".join([*parts, "<p>None has been logged yet.</p></body></html>\n"])
    parts.append(
        f"<p>Shown are steps {', '.join(map(str, steps))}: of the {len(logged) - len(later)} that "
        f"were logged the first, the last, and up to {STEPS - 2} between, evenly by their place. "
        "Of each, the groups that were logged: the first of the step and the one in its middle. "
        "Nothing is chosen by reward or looks. A step's completions are sampled before its update. "
        f"Longer texts than {TEXT} characters are cut in the middle, larger images "
        f"than {SIDE} pixels made smaller; all of them lie in rollouts/.</p>")
    paths = [path for step in steps for path in group_paths(folder, step)]
    parts += [group_section(path, ROOM // len(paths)) for path in paths]
    return "\n".join([*parts, "</body></html>\n"])


# ---- metrics

def read_metrics(path: Path) -> tuple[dict[str, dict[int, float | None]], int]:
    """({metric: {step: value, or None if it is not finite}}, how many lines cannot be read).

    A run that was killed may leave a line that is cut.
    """
    found, unread = {}, 0
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            entries = json.loads(line)
            step = int(entries.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError):
            unread += 1
            continue
        for name, value in entries.items():
            if value is None or type(value) in (int, float):
                finite = value is not None and math.isfinite(value)
                found.setdefault(name, {})[step] = value if finite else None
    return found, unread


def draw(metrics: dict[str, dict[int, float | None]], charts: dict[str, dict[str, str]]) -> str:
    """The charts, without the metrics that the run does not have."""
    drawn = []
    for title, labels in charts.items():
        curves: dict[str, Points] = {label: sorted(metrics[name].items())
                                     for name, label in labels.items() if name in metrics}
        if curves:
            drawn.append(chart(curves, title, log="kl" in labels, width=440, height=240))
    return "\n".join(drawn)


# ---- groups

def logged_steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix("step-") for path in folder.glob("rollouts/step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def chosen(steps: list[int]) -> list[int]:
    """The first, the last, and up to three between, evenly by their place.

    >>> chosen([10, 20, 30, 40, 50, 60, 70, 80, 90])
    [10, 30, 50, 70, 90]
    """
    places = {round(number * (len(steps) - 1) / (STEPS - 1)) for number in range(STEPS)}
    return [steps[place] for place in sorted(places)] if steps else []


def group_paths(folder: Path, step: int) -> list[Path]:
    """The files of a step's groups, in the order of their prompts; broken ones at the end."""
    def place(path: Path) -> tuple:
        try:
            return json.loads(path.read_text())["place"], path.name
        except (ValueError, TypeError, KeyError):
            return math.inf, path.name

    return sorted(folder.glob(f"rollouts/step-{step}/*.json"), key=place)


class Room:
    """What is shown of a group: texts and images, until they take too many bytes."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.left = folder, size

    def take(self, shown: str) -> str:
        size = len(shown.encode(errors="replace"))
        if size > self.left:
            self.left = 0  # else small ones would be shown, and not what stands between them
            return LEFT_OUT
        self.left -= size
        return shown

    def text(self, text: str, kind: str) -> str:
        """The text, escaped; a long one folded. Of a row of equal placeholders one is shown."""
        begin = " ".join(SPECIAL.sub(" ", text).split())[:60]
        text = REPEATED.sub(lambda row: f"{row[1]} x {len(row[0]) // len(row[1])} ", text).strip()
        if len(text) > TEXT:
            cut = len(text) - TEXT
            text = f"{text[:TEXT // 2]} [... {cut} characters ...] {text[-TEXT // 2:]}"
        shown = f'<div class="text {kind}">{html.escape(text)}</div>'
        if len(text) > LONG[kind]:
            shown = (f'<details class="{kind}"><summary>{html.escape(begin)} ...</summary>'
                     f'{shown}</details>')
        return self.take(shown)

    def images(self, names: list[str]) -> str:
        return "".join(self.image(name) for name in names)

    def image(self, name: str) -> str:
        """The image in the page itself, as PNG or JPEG, whichever is smaller."""
        if not self.left:
            return LEFT_OUT
        try:
            image = load_image(self.folder / Path(name).name)
        except ValueError:
            return f"<i>{html.escape(name)} cannot be read</i>"
        image.thumbnail((SIDE, SIDE))
        kind, content = min((("png", encoded(image, "PNG")), ("jpeg", encoded(image, "JPEG"))),
                            key=lambda form: len(form[1]))
        scale = max(1, SMALL // max(image.size))
        shown = (f'<img{" class=small" if scale > 1 else ""} width="{scale * image.width}" '
                 f'height="{scale * image.height}" alt="{html.escape(name)}" '
                 f'src="data:image/{kind};base64,{base64.b64encode(content).decode()}">')
        return self.take(shown)


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def group_section(path: Path, size: int) -> str:
    """A group: its prompt, and each completion with what it was worth. Size: bytes, at most."""
    step = path.parent.name.removeprefix("step-")
    title = f"Step {step}, example {html.escape(path.stem)}"
    try:
        group = json.loads(path.read_text())
        return f"<section><h3>{title}</h3>\n{group_html(group, Room(path.parent, size))}</section>"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # of a run that was killed
        return f"<section><h3>{title}</h3><p>{html.escape(path.name)} cannot be read.</p></section>"


def group_html(group: dict, room: Room) -> str:
    completions = group["completions"]
    rewards = [said["reward"] for said in completions]
    advantages = [said["advantage"] for said in completions]
    finite = [value for value in rewards if value is not None]
    mean = sum(finite) / max(1, len(finite))
    far = max((abs(value) for value in advantages if value is not None), default=0) or 1
    rows = []
    for number, said in enumerate(completions, 1):
        scores = said.get("rewards", {})
        notes = []
        if len(scores) > 1:
            notes = [html.escape(f"{name} {value:.3g}") for name, value in scores.items()]
        if said["finish_reason"] == "length":
            notes.append("cut")
        rows.append(
            f"<tr><td>{number}</td>"
            f"<td>{bar(said['reward'], min([0, *finite]), max([0, *finite]), REWARD)}"
            f'<div class="note">{"<br>".join(notes)}</div></td>'
            f"<td>{bar(said['advantage'], -far, far, ADVANTAGE)}</td>"
            f'<td><div class="turns">{turns_html(said["turns"], room)}</div></td></tr>')
    answer = room.text(f"Answer: {group['answer']}", "prompt") if group["answer"] else ""
    return "\n".join([room.images(group["images"]), room.text(group["prompt"], "prompt"), answer,
                      f"<table><tr><th></th><th>reward, mean {mean:.3g}</th><th>advantage</th>"
                      "<th>completion</th></tr>", *rows, "</table>"])


def turns_html(turns: list[dict], room: Room) -> str:
    """Boxes side by side, each with a reply, or a history that begins anew, and what followed."""
    shown = '<div class="turn">'
    for turn in turns:
        if "policy" in turn:
            shown += room.text(turn["policy"], "policy")
        else:
            text = turn.get("environment") or f"The history begins anew: {turn['anew']}"
            shown += '</div><div class="turn">' + room.images(turn["images"])
            shown += room.text(text, "environment")
    return shown + "</div>"


def main(arguments: list[str]) -> None:
    with mistakes():
        if len(arguments) != 1:
            raise ValueError("usage: python -m support.report RUN_FOLDER")
        print(write(Path(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a run writes beside its checkpoints: metrics, sampled rollouts, bad batches, the report."""
import collections
import contextlib
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from support import report
from support.check import CAUSES
from support.checkpoint import own_checkpoints, set_aside
from support.text import describe

GROUPS = 2  # whose completions are written of a step
TRACES = ("metrics.jsonl", "rollouts", "bad-batch-*.pt", report.NAME)  # beside its checkpoints


class Records:
    """The files in output_dir/run_name, and Weights & Biases if the config names a project.

    With several ranks rank 0 alone has one.
    """

    def __init__(self, config):
        self.config, self.folder, self.wandb = config, config.run_dir, None
        self.unwritten = ""  # lines of metrics.jsonl
        if config.wandb_project:
            import wandb
            self.wandb = wandb.init(project=config.wandb_project, name=config.run_name,
                                    config=config.to_record())

    def open(self, past_metrics: str | None) -> None:
        """Set the metrics back to those of the checkpoint.

        None if the run begins anew: then what an earlier run left here is moved away.
        """
        if past_metrics is None:
            traces = [path for name in TRACES for path in self.folder.glob(name)]
            set_aside([*traces, *own_checkpoints(self.folder).values()], self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "metrics.jsonl").write_text(past_metrics or "")

    def write(self, metrics: dict[str, float]) -> None:
        """Add a line to metrics.jsonl; metrics["step"] says of which step.

        What a full disk does not take is written with the next line.
        """
        self.unwritten += to_json(metrics) + "\n"
        with said_if_not_written("metrics wait, for they"):
            self.folder.mkdir(parents=True, exist_ok=True)  # it is the user's to move away
            with open(self.folder / "metrics.jsonl", "ab", buffering=0) as file:
                written = file.write(self.unwritten.encode())  # perhaps a part, which then counts
            self.unwritten = self.unwritten[written:]
        if self.wandb:
            self.wandb.log(metrics, step=metrics["step"])

    def write_step(self, metrics: dict[str, float], outputs, tokenizer, largest_kl: float) -> None:
        """The metrics of a step, and what went wrong in it: a mismatch KL above the largest, too.

        Of the first step, of the last, and every log_every_steps some rollouts, too.
        """
        step = metrics["step"]
        self.write(metrics)
        for reason, count in collections.Counter(outputs.dropped).most_common(3):
            tqdm.write(f"step {step}: {count} completions dropped: {reason[:300]}")
        if not metrics["kl"] <= largest_kl:  # NaN is not
            tqdm.write(f"step {step}: mismatch KL {metrics['kl']:.2g}, usually from {CAUSES}")
        if step % self.config.log_every_steps == 0 or step in (1, self.config.max_steps):
            with said_if_not_written(f"rollouts of step {step}"):
                self.write_rollouts(step, outputs, tokenizer)

    def write_rollouts(self, step: int, outputs, tokenizer) -> None:
        """Whole groups, spread over the step: each turn with its images, and what it was worth."""
        folder = self.folder / "rollouts" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        groups = list(dict.fromkeys(outputs.example_id))
        written = {}
        for name in groups[::max(1, len(groups) // GROUPS)][:GROUPS]:
            rows = [row for row, example in enumerate(outputs.example_id) if example == name]
            first = rows[0]
            group = {"place": groups.index(name),  # among the prompts of the step
                     "prompt": tokenizer.decode(outputs.prompt_ids[first]),
                     "answer": outputs.answer[first],
                     "images": write_images(folder, f"{name}", outputs.images[first]),
                     "completions": []}
            firsts = set(outputs.first_rows())
            for number, row in enumerate(rows):
                label = f"{name}-{number}"
                turns = write_turns(folder, label, outputs, row, tokenizer)
                if row in firsts:
                    group["completions"].append({
                        "turns": turns, "reward": outputs.reward[row],
                        "rewards": {name: values[row] for name, values in outputs.metrics.items()},
                        "advantage": outputs.advantage[row],
                        "finish_reason": outputs.finish_reason[row]})
                else:  # another stretch of the same conversation
                    anew = {"anew": tokenizer.decode(outputs.prompt_ids[row]),
                            "images": write_images(folder, label, outputs.images[row])}
                    group["completions"][-1]["turns"] += [anew, *turns]
                    group["completions"][-1]["finish_reason"] = outputs.finish_reason[row]
            (folder / f"{name}.json").write_text(to_json(group))
            written[name] = group
        if self.wandb:
            self.wandb.log({"rollouts": table(written, folder)}, step=step)

    def write_report(self) -> None:
        """report.html of the run, which does not end for its sake, whatever goes wrong in it."""
        try:
            report.write(self.folder)
        except Exception as error:
            tqdm.write(f"{report.NAME} could not be written: {describe(error)}")

    def write_bad_batch(self, step: int, batch) -> Path:
        """A batch without finite loss or gradient, for torch.load(weights_only=True)."""
        path = self.folder / f"bad-batch-{step}.pt"
        with said_if_not_written(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(vars(batch), path)
        return path


def write_turns(folder: Path, name: str, outputs, row: int, tokenizer) -> list[dict]:
    """What the policy and the environment said after the prompt, in turns, as token ids say it."""
    turns, start, ids = [], 0, outputs.completion_ids[row]
    for number, reply in enumerate(outputs.replies[row]):
        said = ids[reply.start:reply.end]
        images = write_images(folder, f"{name}-{number}", reply.images)
        turns += [{"policy": tokenizer.decode(ids[start:reply.start])},
                  {"environment": tokenizer.decode(said), "images": images}]
        start = reply.end
    return [*turns, {"policy": tokenizer.decode(ids[start:])}]


def write_images(folder: Path, name: str, images: list) -> list[str]:
    """The names of the files."""
    names = []
    for number, image in enumerate(images):
        names.append(f"{name}-image-{number}.png")
        image.save(folder / names[-1])
    return names


def table(groups: dict[str, dict], folder: Path):
    """The groups of a step for Weights & Biases: a row per completion, with its images."""
    import wandb

    def pictures(names: list[str]) -> list:
        return [wandb.Image(str(folder / name)) for name in names]

    rows = []
    for name, group in groups.items():
        for said in group["completions"]:
            texts = [f"{who}: {text}" for turn in said["turns"]
                     for who, text in turn.items() if who != "images"]
            shown = [image for turn in said["turns"] for image in turn.get("images", ())]
            rows.append([str(name), group["prompt"], pictures(group["images"]), "\n".join(texts),
                         pictures(shown), said["reward"], said["advantage"],
                         said["finish_reason"]])
    return wandb.Table(columns=["example", "prompt", "images", "turns", "images of replies",
                                "reward", "advantage", "finish_reason"], data=rows)


@contextlib.contextmanager
def said_if_not_written(what):
    """A run does not end for the sake of files that it does not need."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's is a RuntimeError
        tqdm.write(f"{what} could not be written: {error}")


def to_json(value) -> str:
    """The value as JSON, which has no NaN and no infinity: null in their place."""
    def finite(value):
        if isinstance(value, dict):
            return {str(key): finite(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [finite(entry) for entry in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    return json.dumps(finite(value), default=str)

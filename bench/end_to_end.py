"""The default task end to end, beside TRL with its own generation, from the same prompts.

    python bench/end_to_end.py [--trl-python PATH] [--rounds 3] [--steps 80]

The sides take turns, each in a process of its own, as a user would start it:

    ours     python train.py @ config.toml eval_every_steps=0, which starts its vLLM server
    trl      TRL's GRPOTrainer, which generates with transformers; the same model, prompts in the
             same order, reward, loss, learning rate, batch of 256 and micro-batches of 64
    server   the bare vLLM server, until it answers: what waiting for it costs at least

Of every run: when each step had ended, in seconds from the start of the process; the mean reward of
its 256 completions; and the largest memory that its processes held together (unique set size).
Raw lines are appended to results/end_to_end.jsonl; the table of this run is printed.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RAW = ROOT / "results" / "end_to_end.jsonl"
GOOD = 0.95  # mean reward of a step


def train_with_trl(steps: int) -> None:
    """Print {"reward": ...} of every step; to be run in a process of its own."""
    import random

    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rollout import load_environment, shuffled
    from support.config import load_config
    config = load_config(str(ROOT / "config.toml"))
    environment = load_environment(config.env_id, config.env_args)
    [score] = environment.rewards
    order = []
    while len(order) < steps * config.rollouts_per_step:
        epoch = len(order) // len(environment.train)
        order += shuffled(len(environment.train), f"{config.seed}-{epoch}")
    rows = []
    for index in order[:steps * config.rollouts_per_step]:
        row = environment.train[index]
        image, text = row["prompt"][0]["content"]
        rows.append({"prompt": [{"role": "user", "content": text["text"]}],
                     "images": [image["image"]], "answer": row["answer"]})

    def accuracy(completions, answer, **_):
        return [score(completion[0]["content"], right)
                for completion, right in zip(completions, answer, strict=True)]

    class Tell(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            if "reward" in logs:
                print(json.dumps({"reward": float(logs["reward"])}), flush=True)

    random.seed(config.seed)
    model = AutoModelForImageTextToText.from_pretrained(config.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(config.model)
    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            model, accuracy,
            GRPOConfig(folder, per_device_train_batch_size=config.micro_batch_size,
                       num_generations=config.group_size, max_steps=steps,
                       gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
                       max_completion_length=config.max_tokens, temperature=config.temperature,
                       learning_rate=config.learning_rate, lr_scheduler_type="constant",
                       max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay,
                       loss_type="dapo", scale_rewards="none", beta=0.0, use_vllm=False,
                       gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1,
                       shuffle_dataset=False, save_strategy="no", report_to="none",
                       disable_tqdm=True, seed=config.seed),
            Dataset.from_list(rows), processing_class=processor, callbacks=[Tell()]).train()


def memory(process, stop: threading.Event, found: list) -> None:
    """The unique set sizes of a process and its children, in GB, until it is told to stop."""
    import psutil
    while not stop.wait(0.5):
        total = 0
        try:
            for one in [psutil.Process(process.pid),
                        *psutil.Process(process.pid).children(recursive=True)]:
                total += one.memory_full_info().uss
        except psutil.Error:
            continue
        found.append(total / 1e9)


def run(side: str, args) -> dict:
    """One run of a side."""
    with tempfile.TemporaryDirectory() as folder:
        port = 8741
        words = ["@", "config.toml", f"output_dir={folder}", f"vllm_server_port={port}"]
        commands = {
            "ours": [sys.executable, "train.py", *words, "eval_every_steps=0",
                     f"max_steps={args.steps}"],
            "trl": [args.trl_python, __file__, "--child", "--steps", str(args.steps)],
            "server": [sys.executable, "sync.py", *words]}
        start, ends, rewards, sizes = time.perf_counter(), [], [], [0.0]
        with open(Path(folder, "out"), "w") as out:
            process = subprocess.Popen(commands[side], cwd=ROOT, stdout=out, stderr=out)
        stop = threading.Event()
        watcher = threading.Thread(target=memory, args=(process, stop, sizes))
        watcher.start()
        told = Path(folder, "colors", "metrics.jsonl") if side == "ours" else Path(folder, "out")
        while process.poll() is None:
            if side == "server" and "Application startup complete" in read(
                    Path(folder, "colors-vllm.log")):
                ends.append(time.perf_counter() - start)
                process.terminate()
                process.wait()
            lines = [json.loads(line) for line in read(told).splitlines()
                     if line.startswith('{"') and line.endswith("}")]
            for line in lines[len(rewards):]:
                ends.append(time.perf_counter() - start)
                rewards.append(line["reward"])
            time.sleep(0.02)
        total = time.perf_counter() - start
        stop.set()
        watcher.join()
        if side != "server" and len(rewards) != args.steps:
            sys.exit(f"{side}: {len(rewards)} steps\n{read(Path(folder, 'out'))[-3000:]}")
        return {"side": side, "ends": ends, "rewards": rewards, "total": total,
                "peak_gb": max(sizes)}


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def table(lines: list[dict]) -> str:
    """Medians over the runs of each side."""
    rows = ["| side | seconds per step | first step | mean reward of 0.95 | total | peak GB |",
            "|---|---|---|---|---|---|"]
    for side in dict.fromkeys(line["side"] for line in lines):
        runs = [line for line in lines if line["side"] == side]
        ends = [line["ends"] for line in runs]
        cells = [[statistics.median(b - a for a, b in zip(e, e[1:])) for e in ends if len(e) > 1],
                 [e[0] for e in ends],
                 [end for line in runs for end in [time_to(line)] if end is not None],
                 [line["total"] for line in runs], [line["peak_gb"] for line in runs]]
        rows.append(f"| {side} | " + " | ".join(
            f"{statistics.median(cell):.2f}" if cell else "-" for cell in cells) + " |")
    return "\n".join(rows)


def time_to(line: dict) -> float | None:
    """When the first step ended whose mean reward is good; None: it never was."""
    for end, reward in zip(line["ends"], line["rewards"]):
        if reward >= GOOD:
            return end
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--sides", nargs="+", default=["ours", "trl", "server"])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        train_with_trl(args.steps)
        return
    lines = []
    for side in args.sides * args.rounds:
        lines.append(run(side, args))
        with RAW.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(side, f"{lines[-1]['total']:.1f} s", flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()

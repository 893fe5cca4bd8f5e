"""What a second turn costs: `python bench/conversations.py`, the tiny model on a real vLLM server.

In turns: 256 conversations of two turns, with a picture in each turn, and 512 completions in one
turn each, so the same number of completions. Both as in training: 16 to a prompt, encoded for the
adapter, with 8 tokens at most. Appends a line per pair to results/conversations.jsonl, {"two_turns":
seconds, "one_turn": seconds}, and prints the ratio of the medians of each half of the pairs.
"""
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from conftest import free_port  # noqa: E402  (needs the path)
from envs.colors import load_environment  # noqa: E402
from support.config import load_config  # noqa: E402
from train import served  # noqa: E402

PAIRS = 10
pictures = load_environment()


def ask_again(say, completion, answer, number):
    """Another picture, of the other split: no prompt was ever of it."""
    say(pictures.eval[number % len(pictures.eval)]["prompt"])


class Numbered:
    """Rows whose info is their number."""

    def __len__(self):
        return len(pictures.train)

    def __getitem__(self, number):
        return {**pictures.train[number], "info": {"number": number}}


def seconds(generator, step: int, prompts: int) -> float:
    start = time.perf_counter()
    outputs = generator.collect(generator.begin(step, prompts, 16))
    took = time.perf_counter() - start
    turns = sum(len(replies) + 1 for replies in outputs.replies)
    if turns != 512 or outputs.dropped:
        raise RuntimeError(f"{turns} completions, not 512: {outputs.dropped[:1]}")
    return took


def main():
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(str(ROOT / "config.toml"), [
            f"output_dir={folder}", f"vllm_server_port={free_port()}", "eval_every_steps=0"])
        with served(config) as trainer:
            single = dataclasses.replace(trainer.environment, train=Numbered(), rewards=[one])
            talking = dataclasses.replace(single, play=ask_again)
            generators = []
            for environment in (talking, single):
                trainer.environment, trainer.generator = environment, None
                trainer.on_server(lambda: None)
                generators.append(trainer.generator)
            talk, alone = generators
            seconds(talk, 0, 16), seconds(alone, 1, 32)  # warm
            pairs = []
            for number in range(1, PAIRS + 1):
                pairs.append({"two_turns": seconds(talk, 6 * number, 16),
                              "one_turn": seconds(alone, 3 * number + 1, 32)})
                print(json.dumps(pairs[-1]), flush=True)
    with open(ROOT / "results" / "conversations.jsonl", "a") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    for half in (pairs[:PAIRS // 2], pairs[PAIRS // 2:]):
        two, one_each = (statistics.median(pair[key] for pair in half) for key in pairs[0])
        print(f"{two:.2f} s in two turns, {one_each:.2f} s in one turn each: {two / one_each:.2f}")


def one(completion, answer, number):
    return 1.0


if __name__ == "__main__":
    main()

"""Faults, each caused for real: killed servers and trainers, hung engines, bad data and numbers."""
import dataclasses
import io
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import sync
from conftest import ROOT, TINY, canned, free_port, make_trainer, noise
from rollout import Environment, Generator, load_environment, load_image
from test_runs import metrics
from train import is_whole, load_config, make_server, served

CLOCKS = ("seconds", "tokens_per_second")  # differ from run to run, as nothing else does


def timeless(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def command(config, **options) -> list[str]:
    """`python train.py` as the config says, on the server that is up."""
    words = [f"{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(config)
             if f.name in ("model", "vllm_server_port", "batch_size", "rollouts_per_step",
                           "micro_batch_size", "output_dir", "eval_every_steps")]
    return [sys.executable, "train.py", "@", str(ROOT / "config.toml"), *words,
            *(f"{key}={value}" for key, value in options.items())]


def wait_for_lines(path: Path, count: int, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)


# ---- resume

def test_a_killed_run_goes_on_bit_for_bit(server, tmp_path):
    """6 steps at once == 3 steps, SIGKILL, 3 steps: metrics and weights."""
    config = dataclasses.replace(server, output_dir=str(tmp_path), eval_every_steps=2)
    options = dict(save_every_steps=3, warmup_steps=4, weight_decay=0.1, max_steps=6)
    subprocess.run(command(config, run_name="straight", **options), cwd=ROOT, check=True,
                   timeout=120)
    run = subprocess.Popen(command(config, run_name="killed", **options), cwd=ROOT)
    folder = tmp_path / "killed"
    wait_for_lines(folder / "metrics.jsonl", 6, run)  # past the checkpoint, which has 5
    run.kill()
    run.wait()
    assert is_whole(folder / "checkpoint-3") and not (folder / "checkpoint-6").exists()
    subprocess.run(command(config, run_name="killed", resume="true", **options), cwd=ROOT,
                   check=True, timeout=120)
    straight, killed = (timeless(metrics(dataclasses.replace(config, run_name=name)))
                        for name in ("straight", "killed"))
    assert [line["step"] for line in straight] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert straight == killed
    one, other = (tmp_path / run / "checkpoint-6" for run in ("straight", "killed"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    one, other = (torch.load(path / "trainer.pt", weights_only=True) for path in (one, other))
    for i, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], other["optimizer"]["state"][i][k]) for k in moments)
    assert torch.equal(one["torch"], other["torch"])
    for name in ("step", "scheduler", "python", "numpy"):
        assert one[name] == other[name]


def test_twenty_kills_at_random_instants_lose_nothing_that_was_saved(server, tmp_path):
    """Half of them in the middle of saving. Each run resumes from the newest checkpoint."""
    config = dataclasses.replace(server, output_dir=str(tmp_path), run_name="killed", batch_size=8,
                                 eval_every_steps=0)
    folder, rng, last = tmp_path / "killed", random.Random(0), 0
    for trial in range(20):
        with open(tmp_path / "out", "w") as out:
            run = subprocess.Popen(command(config, run_name="killed", resume="true",
                                           save_every_steps=1, max_steps=10_000), cwd=ROOT,
                                   stdout=out, stderr=out)
            deadline, until = time.monotonic() + 120, time.monotonic() + 3600
            while time.monotonic() < min(deadline, until):
                assert run.poll() is None, (tmp_path / "out").read_text()
                if trial % 2 == 0 and (folder / "unfinished").exists():
                    time.sleep(rng.uniform(0, 0.03))
                    break
                if trial % 2 == 1 and until > deadline and list(folder.glob("checkpoint-*")) and (
                        "resumed" in (tmp_path / "out").read_text()):
                    until = time.monotonic() + rng.uniform(0, 4)
                time.sleep(0.001)
            assert time.monotonic() < deadline
            run.kill()
            run.wait()
        text = (tmp_path / "out").read_text()
        assert last == 0 or f"resumed from {folder / f'checkpoint-{last}'}" in text
        whole = [int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*") if is_whole(p)]
        assert not whole or max(whole) >= last
        last = max(whole, default=0)
    subprocess.run(command(config, run_name="killed", resume="true", max_steps=last + 1), cwd=ROOT,
                   check=True, timeout=120)
    assert last >= 5
    assert [line["step"] for line in metrics(config)] == list(range(1, last + 2))
    assert len(list(folder.glob("checkpoint-*"))) == 2  # keep_checkpoints


def test_a_damaged_checkpoint_is_passed_over(server, tmp_path, capsys):
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=3, save_every_steps=1,
                                 keep_checkpoints=9)
    with served(config) as trainer:
        trainer.train()
    folder = tmp_path / "colors"
    os.truncate(folder / "checkpoint-3" / "trainer.pt", 1000)
    flipped = bytearray((folder / "checkpoint-2" / "model.safetensors").read_bytes())
    flipped[-100] ^= 1
    (folder / "checkpoint-2" / "model.safetensors").write_bytes(flipped)
    trainer = make_trainer(output_dir=str(tmp_path), run_name="colors", resume=True)
    trainer.resume()
    assert trainer.step == 1 and len(metrics(config)) == 1
    said = capsys.readouterr().out
    assert "checkpoint-3 is damaged" in said and "checkpoint-2 is damaged" in said
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        make_trainer(output_dir=str(tmp_path / "x"), resume=str(folder / "checkpoint-7")).resume()


def test_a_fresh_run_sets_an_earlier_one_aside(server, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=1)
    for _ in range(2):
        with served(config) as trainer:
            trainer.train()
    assert [line["step"] for line in metrics(config)] == [1]
    [earlier] = tmp_path.glob("colors-past-*")
    assert {p.name for p in earlier.iterdir()} == {"metrics.jsonl", "checkpoint-1"}


def test_sigterm_finishes_the_step_and_saves_and_a_second_one_stops_at_once(server, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path))
    for count, code in ((1, 128 + signal.SIGTERM), (2, 128 + signal.SIGTERM)):
        run = subprocess.Popen(command(config, run_name=f"run{count}", max_steps=10_000), cwd=ROOT)
        path = tmp_path / f"run{count}" / "metrics.jsonl"
        wait_for_lines(path, 2, run)
        for _ in range(count):
            run.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert run.wait(60) == code
        steps = path.read_text().count("\n")
        assert (tmp_path / f"run{count}" / f"checkpoint-{steps}").exists() == (count == 1)
    assert sync.Server(config.url, 5).is_healthy()


# ---- the server

def rewards_of(config) -> list[float]:
    return [line["reward"] for line in metrics(config) if "loss" in line]


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """The metrics of a run without faults."""
    config = dataclasses.replace(server, max_steps=6,
                                 output_dir=str(tmp_path_factory.mktemp("undisturbed")))
    with served(config) as trainer:
        trainer.train()
    return timeless(metrics(config))


def engine_processes(group: int) -> list[int]:
    """The vLLM processes of a server's process group that compute."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes() + (path / "comm").read_bytes()
            if os.getpgid(int(path.name)) == group and b"VLLM::" in words:
                found.append(int(path.name))
        except OSError:
            pass
    return found


class KillsWhileSending:
    """A weight source that kills the server once, in the middle of an update."""

    def __init__(self, source, kill, at_version):
        self.source, self.kill, self.at_version, self.sent = source, kill, at_version, 0

    def metadata(self):
        return self.source.metadata()

    def __iter__(self):
        self.sent += 1
        for i, pair in enumerate(self.source):
            if self.sent == self.at_version and i == 20:
                self.kill()
            yield pair


@pytest.mark.timeout(900)
def test_our_server_dies_in_rollouts_and_in_a_sync_and_hangs_and_the_run_is_the_same(
        server, undisturbed, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=6,
                                 vllm_server_port=free_port(), generation_timeout=15)
    with served(config) as trainer:
        group, done = (lambda: trainer.server.process.pid), []

        def accuracy(completion, answer, **info):
            if trainer.step == 2 and "killed" not in done:
                done.append("killed")
                os.killpg(group(), signal.SIGKILL)
            if trainer.step == 4 and "hung" not in done:
                done.append("hung")
                for pid in engine_processes(group()):
                    os.kill(pid, signal.SIGSTOP)
                time.sleep(0.5)
            return real(completion, answer, **info)

        environment = trainer.environment
        real = next(f for f in environment.rewards if f.__name__ == "accuracy")
        rewards = [accuracy if f is real else f for f in environment.rewards]
        trainer.environment = dataclasses.replace(environment, rewards=rewards)
        trainer.weights.source = KillsWhileSending(
            trainer.weights.source, lambda: os.killpg(group(), signal.SIGKILL), at_version=5)
        trainer.train()
    assert set(done) == {"killed", "hung"} and trainer.weights.source.sent >= 5
    assert timeless(metrics(config)) == undisturbed

"""Whole runs on a real vLLM server: who starts it, who stops it, and what is left behind."""
import dataclasses
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import PYTHON, ROOT, TINY, free_port, noise, processes_with
from policy import Policy
from rollout import Environment, Generator
from support.config import MultimodalRLConfig
from support.http import is_healthy
from support.images import png_data_uri
from train import served


def metrics(config) -> list[dict]:
    path = Path(config.output_dir, config.run_name, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_server_that_train_started_ends_with_it(tmp_path):
    """However it ends: by Ctrl-C, by a SIGTERM, or killed."""
    ends = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    ports = {kill: free_port() for kill in ends}
    runs = {kill: subprocess.Popen(
        [PYTHON, "train.py", "@", "config.toml", f"model={TINY}", f"output_dir={tmp_path / str(port)}",
         f"vllm_server_port={port}"], cwd=ROOT, start_new_session=True)
        for kill, port in ports.items()}
    deadline = time.monotonic() + 120
    while not all(processes_with(f"--port {port}") for port in ports.values()):
        assert time.monotonic() < deadline and {run.poll() for run in runs.values()} == {None}
        time.sleep(0.5)
    time.sleep(14)  # in the middle of their start, with workers of their own
    for kill, run in runs.items():
        os.kill(run.pid, kill)
    assert {kill: run.wait(60) for kill, run in runs.items()} == ends
    deadline = time.monotonic() + 20
    while any(processes_with(f"--port {port}") for port in ports.values()):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_server_that_is_up_is_used_again_and_left_running(server, tmp_path):
    for name in ("first", "second"):
        config = dataclasses.replace(server, output_dir=str(tmp_path), run_name=name, max_steps=2)
        with served(config) as trainer:
            trainer.train()
        assert all(line["kl"] < 1e-6 for line in metrics(config))
    assert is_healthy(server.url)
    assert not list(tmp_path.glob("*-vllm.log"))


def test_half_a_sync_is_warned_of_at_once(server, tmp_path, monkeypatch, capsys):
    """A mismatch far below what rollouts ahead have anyway: here equal weights differ by 1e-13."""
    gather = Policy.gather
    at_first = {}

    def without_a_tower(policy, layer):
        weights = gather(policy, layer)
        for name in weights:
            if ".visual." in name:
                weights[name] = at_first.setdefault(name, weights[name].clone())
        return weights

    monkeypatch.setattr(Policy, "gather", without_a_tower)
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=4)
    with served(config) as trainer:
        trainer.train()
    kl = [line["kl"] for line in metrics(config)]
    said = capsys.readouterr().out
    assert kl[0] < 1e-6 and 1e-5 < kl[3] < 0.05
    assert "step 1: mismatch" not in said and "step 4: mismatch KL" in said


def test_a_proxy_of_the_site_is_not_asked_for_the_server(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")  # nobody there
    monkeypatch.setenv("no_proxy", "inside.example")
    with served(dataclasses.replace(server, output_dir=str(tmp_path), max_steps=1)) as trainer:
        trainer.train()
    assert "inside.example" in os.environ["no_proxy"]


def test_kl_grows_when_the_weights_are_never_synced(server, tmp_path, capsys):
    with served(dataclasses.replace(server, output_dir=str(tmp_path), max_steps=1)) as trainer:
        trainer.train()  # the server has the weights of this run's first step now
    config = dataclasses.replace(server, model=str(tmp_path / "colors" / "checkpoint-1"),
                                 output_dir=str(tmp_path), run_name="stale", max_steps=6,
                                 sync_to_vllm_every=0, learning_rate=3e-3, kl_warning=1e-4)
    with served(config) as trainer:
        trainer.train()
    kl = [line["kl"] for line in metrics(config)]
    assert kl[0] < 1e-6 and max(kl[3:]) > 1e-4
    assert "mismatch KL" in (said := capsys.readouterr().out) and "processed_logprobs" in said


def test_the_final_checkpoint_scores_the_same_on_a_new_server(server, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=2, eval_every_steps=2)
    with served(config) as trainer:
        trainer.train()
    score = [line["eval/accuracy"] for line in metrics(config) if "eval/accuracy" in line][-1]
    config = dataclasses.replace(config, model=str(tmp_path / "colors" / "checkpoint-2"),
                                 vllm_server_port=free_port(), sync_to_vllm_every=0)
    with served(config) as trainer:
        trainer.on_server(lambda: None)
        outputs = trainer.generator.evaluate(config.eval_samples)
    assert sum(outputs.reward) / len(outputs) == pytest.approx(score, abs=1 / 800)


@pytest.mark.parametrize("words, message", [
    (["@", "no.toml"], "no.toml: No such file"), ([], "usage: python train.py @ config.toml"),
    (["@", "config.toml", "env.id=nothing"], "environment 'nothing': no load_environment"),
])
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(words, message):
    run = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True,
                         text=True, timeout=60)
    assert run.returncode == 2 and run.stderr.startswith(f"error: {message}")
    assert len(run.stderr.splitlines()) == 1


def test_prompts_of_every_kind_train_together(server, tmp_path):
    """0, 1 and 3 images by path, data URI and object, a system message, fewer rows than prompts."""
    noise(56, 84, 1).save(tmp_path / "a.png")
    parts = [{"type": "image", "image": str(tmp_path / "a.png")},
             {"type": "image_url", "image_url": {"url": png_data_uri(noise(61, 45, 2))}},
             {"type": "image", "image": noise(28, 28, 3)}]
    question = {"type": "text", "text": "What color is it?"}
    rows = [{"prompt": [{"role": "system", "content": "Look."}, {"role": "user", "content": "Hi"}]},
            {"prompt": [{"role": "user", "content": [parts[1], question]}],
             "info": {"best": "red"}},
            {"prompt": [{"role": "user", "content": [question, *parts]}], "answer": "blue"}]
    seen = []

    def length(completion, answer, best="", **info):
        seen.append((answer, best))
        return len(completion) % 3

    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=2, micro_batch_size=5,
                                 env_id="", temperature=0.7)
    with served(config) as trainer:
        trainer.environment = Environment(train=rows, eval=[], rewards=[length], weights=[0.5])
        trainer.train()
    assert all(line["kl"] < 1e-6 for line in metrics(config))
    assert set(seen) == {("", ""), ("", "red"), ("blue", "")}


class Hiccup(http.server.BaseHTTPRequestHandler):
    """Closes its first connection without a word, as a server does with one that was idle."""
    calls = 0

    def do_GET(self):
        Hiccup.calls += 1
        if Hiccup.calls > 1:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "m"}]}')

    def log_message(self, *args):
        pass


def test_a_connection_that_the_server_dropped_is_tried_again():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hiccup) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        generator = Generator(Environment(train=[{}], eval=[], rewards=[]),
                              MultimodalRLConfig(vllm_server_port=web.server_port))
        web.shutdown()
    assert generator.chat["model"] == "m" and Hiccup.calls == 2

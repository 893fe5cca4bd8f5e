"""Rollouts ahead of the trainer: `python bench/overlap.py`, the default run with a slow server.

A proxy before the vLLM server lets the requests of a step pass one by one, evenly over as many
seconds as that step trains for: rollouts take as long as training, and no less if those of two
steps are under way. How long each step trains is measured first, without the proxy. Then come runs
with async_steps = 0 and 1, in turns, for three seeds; with micro_batch_size = 1, for training must
take long enough to hide something behind it. Writes results/overlap.jsonl, a line per run: mean
wall seconds per step (rollouts, training, sync), held-out accuracy; prints the table for the README.
"""
import http.server
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sync import Server  # noqa: E402
from support import secret  # noqa: E402  (needs the path)
from support.config import load_config  # noqa: E402

SEEDS = (0, 1, 2)


class Slow(http.server.BaseHTTPRequestHandler):
    """Passes every request on to Slow.url; those of training in their turn."""
    protocol_version, url = "HTTP/1.1", ""
    lock, free, turns = threading.Lock(), 0.0, iter(())

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if b'"n": 16' in body:  # not an evaluation
            with Slow.lock:
                Slow.free = max(Slow.free, time.monotonic()) + next(Slow.turns, 0)
                mine = Slow.free
            time.sleep(max(0.0, mine - time.monotonic()))
        reply = requests.request(self.command, Slow.url + self.path, data=body, timeout=600,
                                 headers={"Content-Type": "application/json",
                                          **secret.headers(Slow.url)})
        self.send_response(reply.status_code)
        self.send_header("Content-Type", reply.headers.get("Content-Type", "text/plain"))
        self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        self.wfile.write(reply.content)

    do_POST = do_GET

    def log_message(self, *_):
        pass


def run(folder: str, port: int, **options) -> list[dict]:
    """metrics.jsonl of the default run against the server at this port."""
    words = [f"{key}={value}" for key, value in options.items()]
    subprocess.run([sys.executable, "train.py", "@", "config.toml", f"vllm_server_port={port}",
                    f"output_dir={folder}", "micro_batch_size=1", *words], cwd=ROOT, check=True,
                   timeout=1800)
    path = Path(folder, options["run_name"], "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), Slow) as proxy, open(ROOT / "results/overlap.jsonl", "w") as out:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        config = load_config(str(ROOT / "config.toml"), [f"output_dir={folder}"])
        with Server(config):
            Slow.url = config.url
            lines = run(folder, config.vllm_server_port, run_name="alone", eval_every_steps=0)
            turns = [line["seconds_train"] / 16 for line in lines for _ in range(16)]
            for seed, ahead in itertools.product(SEEDS, (0, 1)):
                Slow.turns = iter(turns)
                lines = run(folder, proxy.server_port, run_name=f"{seed}-{ahead}", seed=seed,
                            async_steps=ahead)
                steps = [line for line in lines if "loss" in line]
                parts = {f"seconds_{part}": statistics.mean(s[f"seconds_{part}"] for s in steps)
                         for part in ("rollout", "train", "sync")}
                record = {"seed": seed, "async_steps": ahead,
                          "seconds_per_step": round(sum(parts.values()), 3),
                          **{name: round(value, 3) for name, value in parts.items()},
                          "accuracy": [line["eval/accuracy"] for line in lines
                                       if "eval/accuracy" in line]}
                out.write(json.dumps(record) + "\n")
                out.flush()
        proxy.shutdown()
    found = [json.loads(line) for line in (ROOT / "results/overlap.jsonl").open()]
    for now, ahead in zip(found[::2], found[1::2], strict=True):
        print(f"| {now['seed']} | {now['seconds_per_step']:.2f} s | {ahead['seconds_per_step']:.2f}"
              f" s | {ahead['seconds_per_step'] / now['seconds_per_step']:.2f} "
              f"| {now['accuracy'][-1]:.3f} | {ahead['accuracy'][-1]:.3f} |")


if __name__ == "__main__":
    main()

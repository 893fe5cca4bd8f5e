"""Rollouts ahead of the trainer: `python bench/overlap.py`, the default run with a slow server.

A proxy before the vLLM server holds every completion request back, for as long as makes the
rollouts of a step take as long as its training (measured first, without the proxy). Then the
default run with async_steps = 0 and 1, in turns, for three seeds; with micro_batch_size = 4, for
training must take long enough to hide something behind it. Writes results/overlap.jsonl, a line
per run: mean wall seconds per step (rollouts, training, sync), held-out accuracy.
"""
import http.server
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

from train import load_config, make_server  # noqa: E402  (needs the path)

SEEDS = (0, 1, 2)


class Slow(http.server.BaseHTTPRequestHandler):
    """Passes every request on to Slow.url; completions after Slow.delay seconds."""
    protocol_version, url, delay = "HTTP/1.1", "", 0.0
    local = threading.local()

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/v1/chat"):
            time.sleep(Slow.delay)
        reply = requests.request(self.command, Slow.url + self.path, data=body, timeout=600,
                                 headers={"Content-Type": "application/json"})
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
                    f"output_dir={folder}", "micro_batch_size=4", *words], cwd=ROOT, check=True, timeout=1200)
    path = Path(folder, options["run_name"], "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def seconds(lines: list[dict], part: str) -> list[float]:
    return [line[f"seconds_{part}"] for line in lines if "loss" in line][2:]  # warm


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), Slow) as proxy, open(ROOT / "results/overlap.jsonl", "w") as out:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        config = load_config(str(ROOT / "config.toml"), [f"output_dir={folder}"])
        with make_server(config):
            Slow.url = config.url
            lines = run(folder, config.vllm_server_port, run_name="alone", max_steps=12)
            Slow.delay = max(0.0, statistics.median(seconds(lines, "train"))
                             - statistics.median(seconds(lines, "rollout")))
            for seed in SEEDS:
                for ahead in (0, 1):
                    lines = run(folder, proxy.server_port, run_name=f"{seed}-{ahead}", seed=seed,
                                async_steps=ahead)
                    parts = {part: statistics.mean(seconds(lines, part))
                             for part in ("rollout", "train", "sync")}
                    record = {"seed": seed, "async_steps": ahead, "delay": round(Slow.delay, 3),
                              "seconds_per_step": round(sum(parts.values()), 3),
                              **{f"seconds_{k}": round(v, 3) for k, v in parts.items()},
                              "accuracy": [line["eval/accuracy"] for line in lines
                                           if "eval/accuracy" in line]}
                    print(record, flush=True)
                    out.write(json.dumps(record) + "\n")
                    out.flush()
        proxy.shutdown()


if __name__ == "__main__":
    main()

"""Can this model be trained? `python adapter.py MODEL [--server URL]` asks a real vLLM server.

Sends prompts with 0, 1 and 2 images of odd sizes, compares prompt ids and logprobs with the
trainer's, pushes perturbed weights twice and compares again. One line per image count and weight
version, a verdict at the end; exit code 0 if the model is safe to train, 1 if not.
"""
import argparse
import contextlib
import json
import os
import random
import socket
import tempfile

import torch
from PIL import Image

from rollout import Environment
from train import MultimodalRLConfig, served

SIZES = [(71, 53), (201, 203), (33, 97), (130, 61), (64, 48), (91, 180)]
TOLERANCE = {"cpu": 5e-5, "cuda": 0.5}  # largest logprob difference: fp32 on a CPU, else bf16
ROUNDS = 3


def prompt(num_images: int, rng: random.Random) -> list[dict]:
    """Random pictures (blurred noise, so that nothing is cancelled by resizing) and a question."""
    images = []
    for _ in range(num_images):
        size = rng.choice(SIZES)
        image = Image.frombytes("RGB", (12, 12), rng.randbytes(3 * 12 * 12)).resize(size)
        images.append({"type": "image", "image": image})
    text = {"type": "text", "text": rng.choice(["What is this?", "Describe what you see, please."])}
    return [{"role": "user", "content": [*images, text]}]


def largest_differences(trainer, outputs) -> dict[int, float]:
    """{number of images: largest |trainer logprob - server logprob|}"""
    batch, worst = trainer.build_batch(outputs), {}
    counts = torch.tensor([len(images) for images in outputs.images])
    plain = torch.zeros(batch.input_ids.shape)
    for row in range(len(batch)):
        micro = batch.select(torch.tensor([row]))
        with torch.no_grad():
            logprobs, _ = trainer.logprobs(micro.to(trainer.device), share=False)
        plain[row, :logprobs.shape[1]] = logprobs[0].cpu()
    off = (plain - batch.behavior_logprobs).abs() * batch.loss_mask
    for count in counts.unique().tolist():
        worst[count] = off[counts == count].max().item()
    return worst


def check(trainer, out=print) -> bool:
    """Run all rounds against the trainer's server; whether every difference is in tolerance."""
    tolerance = TOLERANCE[trainer.device.type]
    safe, generator_seed = True, torch.Generator().manual_seed(0)
    for version in range(ROUNDS):
        if version:
            with torch.no_grad():
                for p in trainer.model.parameters():
                    noise = torch.randn(p.shape, generator=generator_seed).to(p)
                    p += 0.05 * p.std(correction=0) * noise
        trainer.step = version  # of the weights
        outputs = trainer.with_server(
            lambda: trainer.generator.begin(version, len(trainer.environment.train), 2)())
        for count, worst in largest_differences(trainer, outputs).items():
            safe &= worst <= tolerance
            out({"images": count, "weight_version": version, "same_ids": True,
                 "max_logprob_difference": worst})
    with contextlib.suppress(RuntimeError):  # different policies: the lines above say it
        trainer.calibrate(trainer.build_batch(outputs))
    out({"shared_prompts_exact": trainer.can_share})
    return safe


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python adapter.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="Hugging Face id or directory")
    parser.add_argument("--server", help="URL of a server that is up (default: start one)")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of text")
    args = parser.parse_args(argv)
    host, port = "127.0.0.1", None
    if args.server:
        host, port = args.server.removeprefix("http://").rstrip("/").split(":")
    else:
        with socket.create_server((host, 0)) as probe:
            port = probe.getsockname()[1]
    rng = random.Random(0)
    rows = [{"prompt": prompt(count, rng), "answer": ""} for count in (0, 1, 1, 2, 2)]

    def show(record: dict) -> None:
        print(json.dumps({"model": os.path.basename(args.model.rstrip("/")), **record})
              if args.json else "  ".join(f"{k}: {v}" for k, v in record.items()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        gpu = torch.cuda.is_available()
        config = MultimodalRLConfig(
            model=args.model, output_dir=folder, vllm_server_host=host, vllm_server_port=int(port),
            temperature=0.7, max_tokens=12, batch_size=4, rollouts_per_step=2,
            inference_args={"enforce_eager": True, "dtype": "bfloat16" if gpu else "float32",
                            "max_model_len": 4096, "max_num_seqs": 16,
                            "limit_mm_per_prompt": {"image": 4}})
        try:
            with served(config) as trainer:
                trainer.environment = Environment(train=rows, eval=[], rewards=[])
                safe, reason = check(trainer, show), "server and trainer are different policies"
        except (ValueError, RuntimeError, OSError) as error:
            safe, reason = False, str(error)
    show({"verdict": "safe to train" if safe else f"do NOT train this model: {reason}"})
    return 0 if safe else 1

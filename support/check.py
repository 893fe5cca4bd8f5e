"""Is it exact? Two questions that a run asks at its start, and a command that asks them before.

Does the server compute the same policy as the trainer (server), and does forwarding each prompt
once change anything (sharing)? `python -m support.check MODEL [--server URL]` asks a real vLLM
server whether a model can be trained: it sends prompts with 0, 1 and 2 images of odd sizes,
compares prompt ids and logprobs with the trainer's, pushes perturbed weights twice and compares
again, and holds conversations of four turns with an image each. One line per image count and weight
version, one of the conversations, and a verdict; exit code 0 if the model is safe to train, 1 if
not.
"""
import argparse
import dataclasses
import json
import math
import os
import random
import socket
import sys
import tempfile

import torch
from PIL import Image
from tqdm import tqdm

from adapter import MultimodalAdapter
from batch import MultimodalBatch
from policy import Policy
from rollout import Environment, Generator
from support.config import MultimodalRLConfig
from support.loading import load_model
from support.text import describe
from sync import CheckpointSource, Server

CAUSES = ("weights that do not arrive, a server without --logprobs-mode processed_logprobs, other "
          "dtypes, kernels or pixel limits, or a model that vLLM computes in another way")
SIZES = [(71, 53), (201, 203), (33, 97), (130, 61), (64, 48), (91, 180)]
TOLERANCE = {"cpu": 5e-5, "cuda": 0.5}  # largest logprob difference: fp32 on a CPU, else bf16
ROUNDS = 3
TURNS = 4


def is_exact(policy: Policy) -> bool:
    """Whether differences are of fp32 on a CPU; else they are of bf16."""
    return policy.model.device.type == "cpu" and policy.model.dtype == torch.float32


def sharing(policy: Policy, micro: MultimodalBatch) -> None:
    """Stop sharing prompts unless it changes neither logprobs nor gradient of this micro-batch.

    Prints why. A cache that cannot be forked raises; one that is detached would lose the gradients
    of prompts and images without a word.
    """
    if not policy.can_share:
        return
    tolerance = 1e-4 if is_exact(policy) else 0.2
    alone = probe(policy, micro, share=False)
    try:
        torch.testing.assert_close(probe(policy, micro, share=True), alone, rtol=tolerance,
                                   atol=tolerance)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        policy.can_share = False
        policy.zero_grad()
        reason = " ".join(str(error).split())[:200]
        tqdm.write("prompts are not shared, every completion is forwarded with its own: " + reason)


def probe(policy: Policy, micro: MultimodalBatch, share: bool) -> tuple[torch.Tensor, float]:
    """The (b, L) logprobs of a micro-batch, and the norm of the gradient of their sum."""
    logprobs, _ = policy(micro, share)
    logprobs.sum().backward()
    norm = policy.clip_gradients(math.inf)
    policy.zero_grad()
    return logprobs.detach(), norm


def server(policy: Policy, micro: MultimodalBatch, must_agree: bool) -> dict[str, float]:
    """How far the server's logprobs are from ours: {"max", "mean", "kl"}, and one line of them.

    RuntimeError, on every rank alike, if they must agree and their mean difference is too large.
    """
    with torch.no_grad():
        logprobs, _ = policy(micro, share=False)
    off = (logprobs - micro.behavior_logprobs)[micro.loss_mask.bool()]  # (N,)
    found = {"max": off.abs().max().item(), "mean": off.abs().mean().item(),
             "kl": (off.expm1() - off).mean().item()}
    message = (f"trainer and server: logprobs of {len(off)} tokens differ by {found['max']:.1e} "
               f"at most, {found['mean']:.1e} in the mean; KL {found['kl']:.1e}")
    tqdm.write(message)
    if must_agree and not found["mean"] <= (1e-4 if is_exact(policy) else 0.05):  # NaN is not
        error = RuntimeError(f"{message}. These are different policies, by {CAUSES}")
        error.on_all_ranks = True
        raise error
    return found


def make_prompt(num_images: int, rng: random.Random) -> list[dict]:
    """Random pictures (blurred noise, so that nothing is cancelled by resizing) and a question."""
    content = []
    for _ in range(num_images):
        noise = Image.frombytes("RGB", (12, 12), rng.randbytes(3 * 12 * 12))
        content.append({"type": "image", "image": noise.resize(rng.choice(SIZES))})
    question = rng.choice(["What is this?", "Describe what you see, please."])
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def largest_differences(policy: Policy, batch: MultimodalBatch,
                        num_images: list[int]) -> dict[int, float]:
    """{number of images in the prompt: the largest |trainer logprob - server logprob|}"""
    worst = {}
    for row, count in enumerate(num_images):
        micro = batch.select([row]).to(policy.model.device)
        with torch.no_grad():
            logprobs, _ = policy(micro, share=False)
        off = (logprobs - micro.behavior_logprobs).abs() * micro.loss_mask
        found = off.max()
        worst[count] = torch.maximum(found, worst.get(count, found))  # NaN stays NaN
    return {count: worst[count].item() for count in sorted(worst)}


def perturb(model, generator: torch.Generator) -> None:
    """Move every weight by a twentieth of the spread of its tensor, at random."""
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            p += 0.05 * p.std(correction=0) * noise


def conversations(model, adapter: MultimodalAdapter, config: MultimodalRLConfig) -> str:
    """Whether some of several turns, with an image in each, are exact: how far off, or why not.

    The temperature is high, so that completions hold what no tokenizer would write.
    """
    def play(say, completion, answer):
        rng = random.Random(1)
        for _ in range(TURNS - 1):
            say(make_prompt(1, rng))

    config = dataclasses.replace(config, temperature=2.0)
    policy, prompt = Policy(model, config), make_prompt(1, random.Random(0))
    environment = Environment(train=[{"prompt": prompt}] * 2, eval=[], rewards=[], play=play)
    generator = Generator(environment, config, policy.banned, adapter, adapter.tokenizer.decode)
    try:
        outputs = generator.collect(generator.begin(0, 2, 4))
        batch = adapter.build_batch(outputs).cut_at(policy.banned)
    except (ValueError, RuntimeError) as error:
        return f"not possible: {describe(error)}"
    turns = min(len(replies) for replies in outputs.replies) + 1
    [worst] = largest_differences(policy, batch, [turns] * len(batch)).values()
    verdict = "exact" if worst <= TOLERANCE[model.device.type] else "NOT exact"
    return f"{verdict}, {turns} turns, max_logprob_difference {worst:.1e}"


def check_model(config: MultimodalRLConfig, report) -> bool:
    """Compare server and trainer over all rounds; whether every difference is in tolerance."""
    model, processor = load_model(config)
    adapter, policy = MultimodalAdapter(processor), Policy(model, config)
    source, noise = CheckpointSource(model), torch.Generator().manual_seed(0)
    rng, safe = random.Random(0), True
    rows = [{"prompt": make_prompt(count, rng), "answer": ""} for count in (0, 1, 1, 2, 2)]
    environment = Environment(train=rows, eval=[], rewards=[])
    with Server(config) as vllm:
        generator = Generator(environment, config, policy.banned, adapter,
                              processor.tokenizer.decode)
        for version in range(ROUNDS):
            if version > 0:
                perturb(model, noise)
            source.weights, source.version = policy.full_weights(), version
            vllm.send(source)
            outputs = generator.collect(generator.begin(version, len(rows), 2))
            batch = adapter.build_batch(outputs).cut_at(policy.banned)
            num_images = [len(images) for images in outputs.images]
            for count, worst in largest_differences(policy, batch, num_images).items():
                safe &= worst <= TOLERANCE[model.device.type]
                report({"images": count, "weight_version": version,
                        "max_logprob_difference": worst})
        report({"conversations": conversations(model, adapter, config)})
    sharing(policy, batch.select(list(range(0, len(batch), 3))).to(model.device))
    report({"shared_prompts_exact": policy.can_share})
    return safe


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m support.check",
                                     description="Can this model be trained?")
    parser.add_argument("model", help="Hugging Face id or directory")
    parser.add_argument("--server", help="URL of a server that is up (default: start one)")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of text")
    args = parser.parse_args(words)
    if args.server:
        host, port = args.server.removeprefix("http://").rstrip("/").split(":")
    else:
        host = "127.0.0.1"
        with socket.create_server((host, 0)) as probe:
            port = probe.getsockname()[1]

    def report(record: dict) -> None:
        if args.json:
            print(json.dumps({"model": os.path.basename(args.model.rstrip("/")), **record}))
        else:
            print("  ".join(f"{key}: {value}" for key, value in record.items()))
        sys.stdout.flush()

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    flags = {"enforce_eager": True, "dtype": dtype, "max_model_len": 4096, "max_num_seqs": 16,
             "limit_mm_per_prompt": {"image": 4}}
    reason = "server and trainer are different policies"
    with tempfile.TemporaryDirectory() as folder:
        config = MultimodalRLConfig(
            model=args.model, output_dir=folder, vllm_server_host=host, vllm_server_port=int(port),
            temperature=0.7, max_tokens=12, batch_size=4, rollouts_per_step=2, max_dropped=0.0,
            inference_args={} if args.server else flags)
        try:
            safe = check_model(config, report)
        except (ValueError, RuntimeError, OSError) as error:
            safe, reason = False, str(error)
    report({"verdict": "safe to train" if safe else f"do NOT train this model: {reason}"})
    return 0 if safe else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

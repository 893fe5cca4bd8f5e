"""Is it exact? Questions that a run asks at its start, and a command that asks them before.

Is the policy that is trained the model's own, and does no token see later ones (forward)? Does the
server compute the same policy (server)? Does forwarding each prompt once change anything (sharing)?

`python -m support.check MODEL [--server URL] [flags of the server]` asks a real vLLM server whether
a model can be trained. It sends prompts with 0, 1 and 2 images of odd sizes, compares prompt ids and
logprobs with the trainer's, first as both have loaded the model, then after each of three weight
updates, and holds conversations of four turns with an image each. One line per image count and
weight version, one per other question, and a verdict, which says whose limit it is where prompts
with some number of images are not possible; exit code 0 if the model is safe to train, 1 if not.
`python -m support.check @ config.toml` asks for no server: it shows rows of the environment as the
model will see them (support/rows.py).
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from PIL import Image
from tqdm import tqdm

from adapter import MultimodalAdapter
from batch import MultimodalBatch
from policy import Policy, logit_changes
from rollout import Environment, Generator
from support import rows, vllm_process
from support.config import MultimodalRLConfig, add_keys, parse_override
from support.loading import load_model
from support.prompts import as_table
from support.server_flags import flags_to_overrides
from support.text import describe
from sync import CheckpointSource, Server

CAUSES = ("weights that do not arrive, a server without --logprobs-mode processed_logprobs, other "
          "dtypes, kernels or pixel limits, or a model that vLLM computes in another way")
NOT_THE_MODEL = {
    "forward": "its logits are not those of its head, by something that the trainer does not know",
    "causal": "its tokens see later ones, so that logprobs depend on what is sampled after them"}
SIZES = [(71, 53), (201, 203), (33, 97), (130, 61), (64, 48), (91, 180)]
COUNTS = (0, 1, 1, 2, 2)  # images of the prompts that are sent
ROUNDS = 3
TURNS = 4


def is_exact(policy: Policy) -> bool:
    """Whether the trainer's differences are of fp32 on a CPU; else they are of bf16."""
    return policy.device.type == "cpu" and policy.model.dtype == torch.float32


def server_is_exact(policy: Policy) -> bool:
    """Whether the server's are, too."""
    return is_exact(policy) and policy.server_dtype not in ("bfloat16", "float16", "half")


def tolerance(policy: Policy) -> float:
    """The largest difference between logprobs of trainer and server that is one of rounding."""
    return 5e-5 if server_is_exact(policy) else 0.5


def largest_kl(policy: Policy, same_weights: bool) -> float:
    """The mismatch KL of a step from which something is wrong, unless the config says another.

    Between equal weights in fp32 it is that of rounding, 1e-12 or less. In bf16, or where the weights
    that sampled are older, there is always some.
    """
    return 1e-5 if same_weights and server_is_exact(policy) else 0.05


def forward(policy: Policy, micro: MultimodalBatch) -> dict[str, float]:
    """Refuse a policy that is not its model: {"forward": |difference of logprobs|, "causal": ...}.

    The policy applies the model's head by itself. "forward" is how far its logprobs are from those
    of the model's own logits, and "causal" how far they move where only a later token is changed.
    What a config leaves open is set to what fits. RuntimeError, on every rank alike, with the
    numbers, if nothing does.
    """
    tolerance = 1e-4 if is_exact(policy) else 0.1
    found = {"causal": fit(policy, [{"completion_type": 0}, {"completion_type": 1}],
                           lambda: lookahead(policy, micro), tolerance),
             "forward": fit(policy, logit_changes(policy.model.config),
                            lambda: head_difference(policy, micro), tolerance)}
    for name, cause in NOT_THE_MODEL.items():
        if not found[name] <= tolerance:  # NaN is not
            error = RuntimeError(f"this model cannot be trained: {cause} ({found[name]:.1e} with "
                                 f"the best of the known ways, at most {tolerance:.0e} is right)")
            error.on_all_ranks = True
            raise error
    return found


def fit(policy: Policy, choices: list[dict], measure: Callable[[], float], most: float) -> float:
    """Set the policy to the first choice that measures at most that, else to the best; its measure."""
    found = []
    for choice in choices:
        vars(policy).update(choice)
        found.append(measure())
        if found[-1] <= most:
            return found[-1]
    best = min(range(len(choices)), key=found.__getitem__)
    vars(policy).update(choices[best])
    return found[best]


def head_difference(policy: Policy, micro: MultimodalBatch) -> float:
    """The largest difference between the policy's logprobs and those of the model's own logits."""
    worst = []
    for row in range(len(micro)):  # one by one: the model makes the logits of whole rows
        one = micro.select([row])
        with torch.no_grad():
            worst.append((policy(one, share=False)[0] - policy.model_logprobs(one)).abs().max())
    return torch.stack(worst).max().item()


def lookahead(policy: Policy, micro: MultimodalBatch) -> float:
    """How far logprobs move at most when the last token of each row is another one."""
    rows, last = torch.arange(len(micro)), micro.attention_mask.sum(1) - 1  # (b,)
    ids = micro.input_ids.clone()
    spare = [i for i in range(len(policy.banned) + 2) if i not in policy.banned]
    ids[rows, last] = torch.where(ids[rows, last] == spare[0], spare[1], spare[0])
    earlier = torch.ones_like(ids).index_put((rows, last), torch.tensor(0))
    with torch.no_grad():
        before, after = (policy(batch, share=False)[0]
                         for batch in (micro, micro.with_fields(input_ids=ids)))
    return ((before - after).abs() * earlier).max().item()


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
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        policy.can_share = False
        policy.zero_grad()
        reason = " ".join(str(error).split())[:200]
        tqdm.write("prompts are not shared, every completion is forwarded with its own: " + reason)


def probe(policy: Policy, micro: MultimodalBatch, share: bool) -> tuple[torch.Tensor, float]:
    """The (b, L) logprobs of a micro-batch, and the norm of the gradient of their sum."""
    with policy.shared_prompts(micro) if share else contextlib.nullcontext() as prompts:
        logprobs, _ = policy(micro, share, prompts)
        logprobs.sum().backward()
    norm = policy.clip_gradients(math.inf)
    policy.zero_grad()
    return logprobs.detach(), norm


def server(policy: Policy, micro: MultimodalBatch, must_agree: bool) -> dict[str, float]:
    """How far the server's logprobs are from ours: {"max", "mean", "kl"}, and one line of them.

    RuntimeError, on every rank alike, if they must agree and their mean difference is too large.
    """
    if must_agree:
        follow(policy, micro)
    off = differences(policy, micro)  # (N,)
    found = {"max": off.abs().max().item(), "mean": off.abs().mean().item(),
             "kl": (off.expm1() - off).mean().item()}
    message = (f"trainer and server: logprobs of {len(off)} tokens differ by {found['max']:.1e} "
               f"at most, {found['mean']:.1e} in the mean; KL {found['kl']:.1e}")
    tqdm.write(message)
    if must_agree and not found["mean"] <= (1e-4 if server_is_exact(policy) else 0.05):  # NaN is not
        error = RuntimeError(f"{message}. These are different policies, by {CAUSES}")
        error.on_all_ranks = True
        raise error
    return found


def differences(policy: Policy, micro: MultimodalBatch) -> torch.Tensor:
    """Our logprobs less the server's, of each token in the loss; (N,)."""
    with torch.no_grad():
        logprobs, _ = policy(micro, share=False)
    return (logprobs - micro.behavior_logprobs)[micro.loss_mask.bool()]


def follow(policy: Policy, micro: MultimodalBatch) -> None:
    """Scale and cap logits as the server does, if it does what the config says and the model not.

    Some classes of transformers leave out what they have in the config of their language model.
    """
    own = {"scale": policy.scale, "cap": policy.cap}
    off = fit(policy, [own, *logit_changes(policy.model.config)],
              lambda: differences(policy, micro).abs().max().item(), tolerance(policy))
    if not off <= tolerance(policy):
        vars(policy).update(own)
    elif (policy.scale, policy.cap) != tuple(own.values()):
        tqdm.write(f"the server scales logits by {policy.scale} and caps them at {policy.cap}, as "
                   "the model's config says and transformers does not: so does the trainer")


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
        micro = batch.select([row]).to(policy.device)
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


def conversations(policy: Policy, adapter: MultimodalAdapter, config: MultimodalRLConfig,
                  images: int = 1) -> str:
    """Whether some of several turns, with so many images in each, are exact: how far off, or why not.

    The temperature is high, so that completions hold what no tokenizer would write.
    """
    def play(say, completion, answer):
        rng = random.Random(1)
        for _ in range(TURNS - 1):
            say(make_prompt(images, rng))

    config = dataclasses.replace(config, temperature=2.0, max_dropped=0.0)
    policy, prompt = copy.copy(policy), make_prompt(1, random.Random(0))
    policy.temperature = config.temperature
    environment = Environment(train=[{"prompt": prompt}] * 2, eval=[], rewards=[], play=play)
    generator = Generator(environment, config, policy.banned, adapter, adapter.tokenizer.decode)
    try:
        outputs = generator.collect(generator.begin(0, 2, 4))
        batch = adapter.build_batch(outputs).cut_at(policy.banned)
    except (ValueError, RuntimeError) as error:
        reason = describe(error)
        if images == 0:
            return f"not possible: {reason}"
        found = conversations(policy, adapter, config, images=0)
        return f"{found}, with an image in the first alone ({limit(reason, config.inference_args)})"
    turns = min(len(replies) for replies in outputs.replies) + 1
    [worst] = largest_differences(policy, batch, [turns] * len(batch)).values()
    verdict = "exact" if worst <= tolerance(policy) else "NOT exact"
    return f"{verdict}, {turns} turns, max_logprob_difference {worst:.1e}"


class Comparison:
    """Trainer and server side by side, on prompts with several numbers of images."""

    def __init__(self, config: MultimodalRLConfig, report):
        self.config, self.report = config, report
        self.model, processor = load_model(config)
        self.adapter, self.policy = MultimodalAdapter(processor), Policy(self.model, config)
        self.policy.ban(self.adapter.tokenizer, self.adapter.reserved())
        self.source = CheckpointSource(self.policy)
        rng = random.Random(0)
        rows = [{"prompt": make_prompt(count, rng), "answer": ""} for count in COUNTS]
        self.environment = Environment(train=rows, eval=[], rewards=[])
        self.refused = {}  # {number of images: why a prompt with so many cannot be trained on}
        self.batch = None  # the last one

    def run(self) -> str:
        """Why the model must not be trained; "" if it can be."""
        with Server(self.config) as vllm:
            self.generator = Generator(self.environment, self.config, self.policy.banned,
                                       self.adapter, self.adapter.tokenizer.decode)
            if vllm.ours and (why := self.compare("as loaded")):
                return f"server and trainer compute different models, before any update: {why}"
            noise = torch.Generator().manual_seed(0)
            for version in range(ROUNDS):
                if version > 0:
                    perturb(self.model, noise)
                self.source.version = version
                vllm.send(self.source)
                if why := self.compare(version):
                    return f"after weight update {version} they compute different models: {why}"
            self.report({"conversations": conversations(self.policy, self.adapter,
                                                        self.config)})
        sharing(self.policy, self.some_rows())
        self.report({"shared_prompts_exact": self.policy.can_share})
        return ""

    def compare(self, version: int | str) -> str:
        """Report the largest differences by image counts; what is wrong with them, or ""."""
        first, step = self.batch is None, 0 if version == "as loaded" else version
        outputs = self.generator.collect(self.generator.begin(step, len(COUNTS), 2))
        self.batch = self.adapter.build_batch(outputs).cut_at(self.policy.banned)
        if first:
            for name, worst in forward(self.policy, self.some_rows()).items():
                self.report({name: worst})
            follow(self.policy, self.some_rows())
        for index, reason in failures(outputs.dropped).items():
            if COUNTS[index] not in self.refused:
                why = limit(reason, self.config.inference_args)
                self.refused[COUNTS[index]] = why
                self.report({"images": COUNTS[index], "not_possible": why})
        num_images = [len(images) for images in outputs.images]
        wrong = []
        for count, worst in largest_differences(self.policy, self.batch, num_images).items():
            self.report({"images": count, "weight_version": version,
                         "max_logprob_difference": worst})
            if not worst <= tolerance(self.policy):  # NaN is not
                wrong.append(f"{images_text(count)}: logprobs differ by {worst:.1e}")
        if not {1, 2} - self.refused.keys():
            wrong.append(f"prompts with images are refused: {self.refused[1]}")
        return "; ".join(wrong)

    def verdict(self) -> str:
        """What a model can be trained with that passed."""
        if not self.refused:
            return "safe to train"
        possible = sorted({*COUNTS} - self.refused.keys())
        counts = " or ".join([*map(str, possible[:-1]), images_text(possible[-1])])
        limits = [f"{images_text(count)}: {why}" for count, why in sorted(self.refused.items())]
        return "; ".join([f"safe to train with {counts}", *limits])

    def some_rows(self) -> MultimodalBatch:
        return self.batch.select(list(range(0, len(self.batch), 3))).to(self.policy.device)


def failures(dropped: list[str]) -> dict[int, str]:
    """{index of the row: why} of what was dropped."""
    found = {}
    for text in dropped:
        name, _, reason = text.partition(": ")
        found[int(name.removeprefix("example "))] = reason
    return found


def limit(reason: str, server_args: dict) -> str:
    """Whose limit it is, if a prompt was refused for the number of its images; else the reason.

    >>> limit("400 At most 1 image(s) may be provided", {"limit_mm_per_prompt": {"image": 4}})
    'the server allows at most 1: vLLM takes no more of them with this model'
    """
    most = re.search(r"At most (\d+) image", reason)
    if not most:
        return reason
    asked = as_table(server_args, "limit_mm_per_prompt").get("image")
    if isinstance(asked, dict):  # with sizes, too
        asked = asked.get("count")
    if asked is None or str(asked) == most[1]:
        return f"the server allows at most {most[1]}, by its flag --limit-mm-per-prompt"
    return f"the server allows at most {most[1]}: vLLM takes no more of them with this model"


def images_text(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"


def main(words: list[str]) -> int:
    if words and words[0].startswith("@"):
        return rows.main()
    parser = argparse.ArgumentParser(
        prog="python -m support.check", description="Can this model be trained?",
        epilog="All other flags are those of the server, as sync.py takes them.")
    parser.add_argument("model", help="Hugging Face id or directory")
    parser.add_argument("--server", help="URL of a server that is up (default: start one)")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of text")
    args, server_words = parser.parse_known_args(words)
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

    folder = tempfile.mkdtemp(prefix="check-")
    safe = False
    try:
        flags = {} if args.server else flags_for(args.model)
        config = MultimodalRLConfig(
            model=args.model, output_dir=folder, vllm_server_host=host, vllm_server_port=int(port),
            temperature=0.7, max_tokens=12, batch_size=4, rollouts_per_step=2, max_dropped=0.99,
            inference_args=flags | server_flags(server_words))
        comparison = Comparison(config, report)
        reason = comparison.run()
        safe = not reason
        verdict = comparison.verdict()
        if not server_is_exact(comparison.policy):
            verdict += (f", as far as {comparison.policy.server_dtype} tells: differences up to "
                        f"{tolerance(comparison.policy)} are taken for rounding")
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error)
    except Exception as error:  # of a model's own forward, for example
        reason = describe(error)
    if safe:
        shutil.rmtree(folder)
    else:
        verdict = f"do NOT train this model: {reason}"
        for log in Path(folder).glob("*.log"):
            error = vllm_process.first_error(log)
            if error and error not in verdict:
                verdict += f"; the first error of the server: {error}"
            verdict += f" (see {log})"
    report({"verdict": verdict})
    return 0 if safe else 1


def server_flags(words: list[str]) -> dict:
    """Flags of vLLM's, as inference.args; ValueError for a word that is none."""
    values = {}
    for override in flags_to_overrides(words):
        add_keys(values, parse_override(override))
    return values.get("inference_args", {})


def flags_for(model: str) -> dict:
    """The flags of a server that the comparison starts."""
    dtype, length = "float32", 4096
    if torch.cuda.is_available() or "linear_attention" in vllm_process.layer_types(model):
        dtype = "bfloat16"  # also on CPUs the kernels of linear attention take nothing else
    with contextlib.suppress(OSError, ValueError):  # load_model says what is wrong with it
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        length = min(length, getattr(config.get_text_config(), "max_position_embeddings", length))
    return {"enforce_eager": True, "dtype": dtype, "max_model_len": length, "max_num_seqs": 16,
            "limit_mm_per_prompt": {"image": TURNS}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A zoo of silent bugs: each put into the default run on purpose, and what becomes of it.

    python bench/zoo.py [name ...] [--steps 30] [--seed 0] [--port 8000]
    python bench/zoo.py --table                        only write the table of docs/zoo.md anew

They are bugs that somebody has met in training by RL; docs/zoo.md says where. Functions below wrap
those of this trainer, and the table ZOO says which; nothing of it is in the modules. A bug is run
as a user would meet it and, where that run is refused or breaks off, once more with all alarms
silenced, to see what a trainer without them would have made of it. Beside the bugs stand their
twins: runs without a bug, with the settings that it needs to show at all.

The runs use the server that is up at the port, or start one for all of them; bugs of the server get
one with other flags. Raw lines: results/zoo.jsonl, the newest of each name, way and seed.
"""
import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py does, before torch
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm

import adapter as adapter_module
import policy as policy_module
import train
from adapter import MultimodalAdapter
from envs import colors
from policy import Policy, vision_token_ids
from rollout import Generator
from support import check, other_server
from support.config import load_config
from support.text import describe
from sync import Server
from train import MultimodalGRPOTrainer

RAW, DOC = ROOT / "results" / "zoo.jsonl", ROOT / "docs" / "zoo.md"
AS_A_USER, SILENCED = "as a user", "silenced"
RECORDED = ("kl", "reward", "masked_fraction", "completion_length", "dropped")  # of every step


# ---- the bugs: each is given the function that it takes the place of, and that one's arguments

def lost_pixels(build_batch, adapter, outputs):
    batch = build_batch(adapter, outputs)
    return batch.with_fields(pixel_values=None, extra_model_kwargs={}, image_rows={})


def another_image(build_batch, adapter, outputs):
    batch = build_batch(adapter, outputs)
    pieces = list(batch.pixel_values.split(batch.image_rows["pixel_values"]))
    moved, places = list(pieces), {}  # by size: a picture of another one would be an error
    for place, piece in enumerate(pieces):
        places.setdefault(len(piece), []).append(place)
    for same_size in places.values():
        for to, source in zip(same_size, same_size[1:] + same_size[:1]):
            moved[to] = pieces[source]
    return batch.with_fields(pixel_values=torch.cat(moved))


def expanded_twice(encode_text, adapter, text, images):
    once = encode_text(adapter, text, images)
    return encode_text(adapter, adapter.tokenizer.decode(once["input_ids"][0]), images)


def no_token_types(with_token_types, batch, *rest):
    kept = dict(batch.extra_model_kwargs)
    kept.pop("mm_token_type_ids", None)
    return batch.with_fields(extra_model_kwargs=kept)


def positions_of_text(whole_rows, policy, batch):
    """Transformers 5 refuses to count positions without token types; so they are given."""
    return {**whole_rows(policy, batch), "position_ids": batch.attention_mask.cumsum(1) - 1}


def retokenised(build_batch, adapter, outputs):
    for row, ids in enumerate(outputs.completion_ids):
        end = []
        if outputs.finish_reason[row] == "stop":
            end = [adapter.tokenizer.eos_token_id]
        text = adapter.tokenizer.decode(ids[:len(ids) - len(end)])
        outputs.completion_ids[row] = adapter.token_ids(text) + end
        outputs.completion_mask[row] = [1] * len(outputs.completion_ids[row])
        outputs.completion_versions[row] = [None] * len(outputs.completion_ids[row])
    return build_batch(adapter, outputs)


def end_masked(build_batch, adapter, outputs):
    batch = build_batch(adapter, outputs)
    trained = batch.input_ids != adapter.tokenizer.eos_token_id
    return batch.with_fields(loss_mask=batch.loss_mask * trained)


def temperature_forgotten(init, policy, *args):
    init(policy, *args)
    policy.temperature = 1.0


def defaults_left_open(init, generator, *args, **kwargs):
    init(generator, *args, **kwargs)
    for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
        del generator.sampling[name]


def first_weights(gather, policy, layer):
    """Those of the beginning, at every sync."""
    at_first = vars(policy).setdefault("weights_at_first", {})
    return {name: at_first.setdefault(name, tensor.clone())
            for name, tensor in gather(policy, layer).items()}


def keeping(*routes: str):
    """The server is not told to empty these caches, and does not while it is paused."""
    def call(original, server, route, *args, **kwargs):
        if route.partition("?")[0] in routes:
            return {}
        return original(server, route.replace("=keep", "=keep&clear_cache=false"), *args, **kwargs)

    return call


def rounded_to_bf16(step, optimizer, *args, **kwargs):
    step(optimizer, *args, **kwargs)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.copy_(p.bfloat16())


def mean_per_micro_batch(gradients, trainer, turns, *rest):
    count = sum(len(chunk.pieces(trainer.config.micro_batch_size)) for [chunk] in turns)

    def own_mean(loss, *tensors, num_tokens=0, **options):
        mask = tensors[4]
        return loss(*tensors[:5], num_tokens=mask.sum().item() * count, **options)

    with around(train, "grpo_loss", own_mean):
        return gradients(trainer, turns, *rest)


def wrong_groups(group_advantages, rewards, groups, *rest):
    return group_advantages(rewards, torch.arange(len(rewards)) % len(groups.unique()), *rest)


def failing(accuracy, completion: str, answer: str, **info) -> float:
    """A judge that cannot be reached in 3 of 10 calls."""
    if random.random() < 0.3:
        raise TimeoutError("the judge is busy")
    return accuracy(completion, answer, **info)


def failing_as_zero(accuracy, *args, **info) -> float:
    with contextlib.suppress(TimeoutError):
        return failing(accuracy, *args, **info)
    return 0.0


def around(owner, name: str, wrapper: Callable):
    """A patch: calls of owner.name become wrapper(original, ...). AttributeError if it has none."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    return mock.patch.object(owner, name, wrapped)


@dataclass(frozen=True)
class Run:
    """A run of the zoo, with a bug or without one."""
    patches: tuple = ()  # (owner, name, wrapper) of each
    twin: str = ""       # of a bug: the run without it, whose options it has
    options: tuple = ()  # overrides of config.toml
    flags: tuple = ()    # of the server, as overrides, of which the trainer does not know


def in_batch(wrapper: Callable) -> tuple:
    return ((MultimodalAdapter, "build_batch", wrapper),)


ZOO = {  # by name: the twins; bugs of images, tokens, sampling, weights, loss and rewards
    "healthy": Run(),
    "healthy-at-0.7": Run(options=("temperature=0.7",)),
    "healthy-at-1.5": Run(options=("temperature=1.5",)),            # other words than the four
    "healthy-row-by-row": Run(options=("temperature=1.5", "share_prompt=false")),
    "healthy-64-prompts": Run(options=("env.args.num_train=64",)),  # every fourth step again
    "healthy-slow": Run(options=("learning_rate=5e-5",)),
    "healthy-small-batches": Run(options=("micro_batch_size=16",)),
    "healthy-with-failures": Run(((colors, "accuracy", failing),)),

    "lost-pixels": Run(in_batch(lost_pixels), "healthy"),
    "another-image": Run(in_batch(another_image), "healthy"),
    "expanded-twice": Run(((MultimodalAdapter, "encode_text", expanded_twice),), "healthy"),
    "other-pixel-limits": Run((), "healthy", flags=(
        'inference.args.mm_processor_kwargs={"size": {"shortest_edge": 784, '
        '"longest_edge": 3136}}',)),
    "no-mrope": Run(((policy_module, "with_token_types", no_token_types),
                     (Policy, "whole_rows", positions_of_text)), "healthy"),

    "retokenised": Run(in_batch(retokenised), "healthy-at-1.5"),
    "sampled-placeholders": Run(((policy_module, "vision_token_ids", lambda *_: []),
                                 (Policy, "ban", lambda *_: None)), "healthy-row-by-row"),
    "end-masked": Run(in_batch(end_masked), "healthy"),

    "raw-logprobs": Run((), "healthy-at-0.7", flags=(
        "inference.args.logprobs_mode=raw_logprobs",)),
    "temperature-forgotten": Run(((Policy, "__init__", temperature_forgotten),), "healthy-at-0.7"),
    "generation-config": Run(((Generator, "__init__", defaults_left_open),), "healthy", flags=(
        'inference.args.override_generation_config={"repetition_penalty": 1.1, "top_k": 20}',)),

    "never-synced": Run(((Policy, "gather", first_weights),), "healthy"),
    "tied-head-not-sent": Run(((Server, "keeps_a_head", lambda *_: False),), "healthy"),
    "old-encoder-cache": Run(((Server, "call", keeping("reset_mm_cache", "reset_encoder_cache")),),
                             "healthy-64-prompts"),
    "old-prefix-cache": Run(((Server, "call", keeping("reset_prefix_cache")),),
                            "healthy-64-prompts"),
    "bf16-weights": Run(((torch.optim.AdamW, "step", rounded_to_bf16),), "healthy-slow"),

    "mean-per-micro-batch": Run(((MultimodalGRPOTrainer, "gradients", mean_per_micro_batch),),
                                "healthy-small-batches"),
    "wrong-groups": Run(((train, "group_advantages", wrong_groups),), "healthy"),
    "failures-as-zero": Run(((colors, "accuracy", failing_as_zero),), "healthy-with-failures")}


# ---- a run

def trusting(build_batch, adapter, outputs):
    """The trainer takes its own prompts, and zeros for missing logprobs, as if it did not look."""
    for row, encoded in enumerate(outputs.encoded):
        outputs.prompt_ids[row] = encoded["input_ids"][0].tolist()
    for row, ids in enumerate(outputs.completion_ids):
        logprobs = outputs.completion_logprobs[row] + [0.0] * len(ids)
        outputs.completion_logprobs[row] = logprobs[:len(ids)]
    return build_batch(adapter, outputs)


def only_said(server, *args, must_agree):
    return server(*args, must_agree=False)


ALARMS_OFF = (  # what is measured is still said
    (check, "forward", lambda *_: {}), (check, "sharing", lambda *_: None),
    (check, "server", only_said), (other_server, "compare_flags", lambda *_: None),
    (adapter_module, "check_places", lambda *_: None),
    (MultimodalAdapter, "as_served", lambda _, adapter, encoded, *rest: encoded),
    (MultimodalAdapter, "build_batch", trusting))


@contextlib.contextmanager
def patched(*patches: tuple):
    """With these (owner, name, wrapper); later ones are around earlier ones."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(around(*patch))
        yield


def carry_out(name: str, way: str, config) -> dict:
    """One run against the server at config.url; its raw line."""
    start, said, ended, trainer = time.perf_counter(), [], "", None
    random.seed(config.seed)
    # The weights of the beginning, whoever came before.
    with patched(*ALARMS_OFF), train.served(config) as first:
        first.ensure_server()
    note = mock.patch.object(tqdm, "write", lambda text, **_: said.append(text))
    alarms_off = ALARMS_OFF if way == SILENCED else ()
    with contextlib.ExitStack() as alive:
        try:
            with note, patched(*alarms_off, *ZOO[name].patches):
                trainer = alive.enter_context(train.served(config))
                trainer.train()
        except Exception as error:  # an alarm, or what the bug broke
            ended = re.sub(r"http://[\w.:]+\w", "the server", describe(error))[:400]
        lines, accuracy = [], None
        if trainer and trainer.step:
            path = config.run_dir / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            with patched(*ALARMS_OFF):  # a server with a bug may be asked all the same
                accuracy = round(held_out_accuracy(trainer), 4)
    steps = [line for line in lines if "loss" in line]
    warned = [int(text.split()[1].rstrip(":")) for text in said if "mismatch KL" in text]
    compared = [text for text in said if text.startswith("trainer and server")]
    logged = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    return {"bug": name, "way": way, "seed": config.seed, "steps": len(steps), "ended": ended,
            "said": "".join(compared), "kl_warnings": warned, "logged_accuracy": logged,
            "accuracy": accuracy, "wall_seconds": round(time.perf_counter() - start, 1),
            **{key: [float(f"{line[key]:.3g}") for line in steps] for key in RECORDED}}


def held_out_accuracy(trainer) -> float:
    """The trained policy's, now that the bug is out: all its weights, sampled as they should be."""
    trainer.server.engine = None  # meet anew, and agree anew on which weights are sent
    trainer.send()
    generator = Generator(colors.load_environment(), trainer.config,
                          vision_token_ids(trainer.model.config), decode=trainer.tokenizer.decode)
    return generator.evaluate(trainer.config.eval_samples).means()["reward"]


def carry_out_all(names: list[str], args) -> None:
    """Make these runs, all that share a server on one; add their raw lines."""
    by_flags = sorted(names, key=lambda name: ZOO[name].flags)
    for flags, alike in itertools.groupby(by_flags, key=lambda name: ZOO[name].flags):
        port = args.port
        if flags:  # not the server that may be up
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            words = [f"output_dir={folder}", "run_name=zoo", f"vllm_server_port={port}",
                     f"max_steps={args.steps}", f"eval_every_steps={args.steps}",
                     f"seed={args.seed}"]
            file = str(ROOT / "config.toml")
            with Server(load_config(file, [*words, *flags])) as server:
                server.lease.release()  # the runs come one after the other
                for name in alike:
                    options = ZOO[ZOO[name].twin or name].options
                    config = load_config(file, [*words, *options])
                    found = [carry_out(name, AS_A_USER, config)]
                    if found[0]["ended"]:
                        found.append(carry_out(name, SILENCED, config))
                    keep(found)


# ---- what came out

def records() -> list[dict]:
    return [json.loads(line) for line in RAW.read_text().splitlines()]


def keep(found: list[dict]) -> None:
    """Add raw lines in the place of those of the same name and seed."""
    new = {(record["bug"], record["seed"]) for record in found}
    kept = [record for record in records() if (record["bug"], record["seed"]) not in new] + found
    kept.sort(key=lambda record: (list(ZOO).index(record["bug"]), record["seed"]))
    RAW.write_text("".join(json.dumps(record) + "\n" for record in kept))
    for record in found:
        print({key: value for key, value in record.items() if key not in RECORDED}, flush=True)


ALARMS = {  # what an error says -> what it is called in the table
    "These are different policies": "start-up check",
    "logprobs_mode": "flags of the server",
    "the chat template writes": "places of images",
    "processor and server (": "prompt ids",
    "one logprob for each sampled": "lengths of ids and logprobs",
    "Image features and image tokens": "error of the model",
    "StopIteration": "error of the processor"}


def alarm(record: dict) -> str:
    """Which alarm fired in a run, and at which step."""
    if record["ended"]:
        names = [name for text, name in ALARMS.items() if text in record["ended"]]
        return f"**{(names or [record['ended'][:60]])[0]}** ends it in step {record['steps'] + 1}"
    warned = record["kl_warnings"]
    if warned:
        return f"`kl` warns {len(warned)} times, first in step {warned[0]}"
    return "none"


def table(found: list[dict]) -> str:
    """What happened, of seed 0. What a run without alarms saw is of the silenced run, if any."""
    lines = ["| run | alarm | alarms silenced | `kl`: first, largest | accuracy, as logged "
             "| of the policy | of the twin |", "|---|---|---|---|---|---|---|"]
    by_name = {(record["bug"], record["way"]): record for record in found if record["seed"] == 0}
    for name, entry in ZOO.items():
        user, silent = by_name[name, AS_A_USER], by_name.get((name, SILENCED))
        last = silent or user
        cells = [f"`{name}`", alarm(user), alarm(silent) if silent else "", "-", "-", "-", "-"]
        if last["steps"]:
            cells[3] = f"{last['kl'][0]:.0e}, {max(last['kl']):.0e}"
            cells[5] = f"{last['accuracy']:.3f}"
        if last["steps"] and not last["ended"]:
            cells[4] = f"{last['logged_accuracy'][-1]:.3f}"
        if entry.twin:
            cells[6] = f"{by_name[entry.twin, AS_A_USER]['accuracy']:.3f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str, found: list[dict]) -> str:
    """The document with its table made anew."""
    head, rest = text.split("<!-- zoo -->\n")
    _, tail = rest.split("\n<!-- end -->", 1)
    return f"{head}<!-- zoo -->\n{table(found)}\n<!-- end -->{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(ZOO))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--table", action="store_true", help="only write docs/zoo.md anew")
    args = parser.parse_args()
    if not args.table:
        carry_out_all(args.names or list(ZOO), args)
    DOC.write_text(with_table(DOC.read_text(), records()))


if __name__ == "__main__":
    main()

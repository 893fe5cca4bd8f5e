"""A zoo of silent bugs: each put into the default run on purpose, and what becomes of it.

    python bench/zoo.py [name ...] [--steps 30] [--seed 0] [--port 8000]
    python bench/zoo.py --table                        only write the tables of docs/zoo.md anew

All of them are bugs that somebody has met in training by RL. A function below puts each into this
trainer, by patches that end with the run; nothing of it is in the modules. Every bug is run as a
user would meet it and, where that run is refused or breaks off, once more with all alarms silenced,
to see what a trainer without them would have made of it. Beside the bugs stand their twins: runs
without a bug, with the settings that it needs to show at all.

The rows use the server that is up at the port, or start one for all of them; bugs of the server get
one with other flags. Raw lines: results/zoo.jsonl, the newest of each bug, way and seed.
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
SMALL_IMAGES = '{"size": {"shortest_edge": 784, "longest_edge": 3136}}'
BENT = '{"repetition_penalty": 1.1, "top_k": 20}'


@dataclass(frozen=True)
class Row:
    """A run of the zoo. The docstring of `patches`, which puts the bug in, says its cause."""
    patches: Callable[[], list]
    met_in: str = ""         # issues or pull requests where somebody met it; "" for a twin
    guard: str = ""          # what keeps it out of this trainer: code, then a test
    twin: str = "healthy"    # the run without the bug, with the same settings
    options: tuple = ()      # overrides of config.toml
    flags: tuple = ()        # of the server, as overrides; the trainer does not know of them

    @property
    def name(self) -> str:
        return self.patches.__name__.replace("_", "-")

    @property
    def cause(self) -> str:
        return " ".join(self.patches.__doc__.split())


ZOO: dict[str, Row] = {}


def row(**fields):
    """Enters a function that returns patches into the zoo."""
    def enter(patches):
        found = Row(patches, **fields)
        ZOO[found.name] = found
        return patches
    return enter


def around(owner, name: str, wrapper: Callable):
    """A patch: calls of owner.name become wrapper(original, ...). AttributeError if it has none."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    return mock.patch.object(owner, name, wrapped)


# ---- runs without a bug

@row()
def healthy():
    """The default run as it is."""
    return []


@row(options=("temperature=0.7",))
def healthy_at_0_7():
    """At temperature 0.7."""
    return []


@row(options=("temperature=1.5",))
def healthy_at_1_5():
    """At temperature 1.5, where a good part of the completions is none of the four words."""
    return []


@row(options=("env.args.num_train=64",))
def healthy_64_prompts():
    """64 prompts, so that the server sees each picture again after four steps."""
    return []


@row(options=("learning_rate=5e-5",))
def healthy_slow():
    """At a tenth of the learning rate."""
    return []


@row(options=("micro_batch_size=16",))
def healthy_small_batches():
    """In micro-batches of 16 rows."""
    return []


def failing(accuracy, completion: str, answer: str, **info) -> float:
    if random.random() < 0.3:
        raise TimeoutError("the judge is busy")
    return accuracy(completion, answer, **info)


@row()
def healthy_with_failures():
    """With a judge that fails in 3 of 10 calls; what it failed at is dropped."""
    return [around(colors, "accuracy", failing)]


# ---- images

@row(met_in="unslothai/unsloth#11031",
     guard="support/check.py: server; test_a_changed_pixel_changes_the_logprobs")
def lost_pixels():
    """The pixels get lost on the trainer's side: it scores answers to pictures that it never saw."""
    def blind(build_batch, adapter, outputs):
        batch = build_batch(adapter, outputs)
        return batch.with_fields(pixel_values=None, extra_model_kwargs={}, image_rows={})

    return [around(MultimodalAdapter, "build_batch", blind)]


@row(met_in="huggingface/trl#6619",
     guard="batch.py: images_of, support/check.py: server; test_every_row_keeps_its_own_pixels")
def another_image():
    """Images are shifted by a row: a prompt is scored with the next picture of the same size."""
    def shifted(build_batch, adapter, outputs):
        batch = build_batch(adapter, outputs)
        pieces = list(batch.pixel_values.split(batch.image_rows["pixel_values"]))
        moved, places = list(pieces), {}  # by size
        for place, piece in enumerate(pieces):
            places.setdefault(len(piece), []).append(place)
        for same_size in places.values():
            for to, source in zip(same_size, same_size[1:] + same_size[:1]):
                moved[to] = pieces[source]
        return batch.with_fields(pixel_values=torch.cat(moved))

    return [around(MultimodalAdapter, "build_batch", shifted)]


@row(met_in="huggingface/trl#6294, PrimeIntellect-ai/prime-rl#1739",
     guard="adapter.py: check_places, as_served; test_a_template_has_one_place_for_each_image")
def expanded_twice():
    """A prompt whose image placeholder was expanded already goes through the processor again."""
    def twice(encode_text, adapter, text, images):
        once = encode_text(adapter, text, images)
        again = adapter.tokenizer.decode(once["input_ids"][0])
        return {**once, "input_ids": encode_text(adapter, again, images)["input_ids"]}

    return [around(MultimodalAdapter, "encode_text", twice)]


@row(met_in="StarsfieldAI/R1-V#103",
     guard="adapter.py: as_served; "
           "test_a_prompt_that_the_server_read_differently_is_refused",
     flags=(f"inference.args.mm_processor_kwargs={SMALL_IMAGES}",))
def other_pixel_limits():
    """The server shrinks images to a limit that the trainer's processor does not have."""
    return []


@row(met_in="NVIDIA-NeMo/Automodel#3113, QwenLM/Qwen3-VL#488",
     guard="support/token_types.py: with_token_types, support/check.py: server; "
           "test_token_types_are_derived_from_the_grid_alone")
def no_mrope():
    """Positions are counted as in a text, because the model is not told where its images stand."""
    def untyped(_, batch, *rest):
        kept = {name: tensor for name, tensor in batch.extra_model_kwargs.items()
                if name != "mm_token_type_ids"}
        return batch.with_fields(extra_model_kwargs=kept)

    def with_positions(whole_rows, policy, batch):  # without them transformers 5 would say so
        return {**whole_rows(policy, batch), "position_ids": batch.attention_mask.cumsum(1) - 1}

    return [around(policy_module, "with_token_types", untyped),
            around(Policy, "whole_rows", with_positions)]


# ---- tokens

@row(met_in="rllm-org/rllm#816, rllm-org/rllm#272", twin="healthy-at-1-5",
     options=("temperature=1.5",),
     guard="adapter.py: build_batch; test_every_turn_is_trained_as_it_was_sampled")
def retokenised():
    """Completions are trained as the tokens of their text, not as the tokens that were sampled."""
    def from_text(build_batch, adapter, outputs):
        tokenizer = adapter.tokenizer
        for row, ids in enumerate(outputs.completion_ids):
            end = [tokenizer.eos_token_id] * (outputs.finish_reason[row] == "stop")
            text = tokenizer.decode(ids[:len(ids) - len(end)])
            outputs.completion_ids[row] = adapter.token_ids(text) + end
            outputs.completion_mask[row] = [1] * len(outputs.completion_ids[row])
        return build_batch(adapter, outputs)

    return [around(MultimodalAdapter, "build_batch", from_text)]


@row(met_in="StarsfieldAI/R1-V#91", twin="healthy-at-1-5", options=("temperature=1.5",),
     guard="policy.py: vision_token_ids, ban, batch.py: cut_at; "
           "test_a_sampled_image_token_does_no_harm")
def sampled_placeholders():
    """Nothing keeps the policy from sampling an image placeholder, for which there is no image."""
    return [around(policy_module, "vision_token_ids", lambda *_: []),
            around(Policy, "ban", lambda *_: None)]


@row(met_in="huggingface/trl#4970, huggingface/trl#6357",
     guard="adapter.py: build_batch; "
           "test_the_end_token_is_trained_also_when_it_is_the_padding")
def end_masked():
    """The pad token is the end token, and the loss mask, made of "is not padding", leaves it out."""
    def without_ends(build_batch, adapter, outputs):
        batch = build_batch(adapter, outputs)
        trained = batch.input_ids != adapter.tokenizer.eos_token_id
        return batch.with_fields(loss_mask=batch.loss_mask * trained)

    return [around(MultimodalAdapter, "build_batch", without_ends)]


# ---- sampling

@row(met_in="huggingface/trl#4159", twin="healthy-at-0-7", options=("temperature=0.7",),
     guard="support/vllm_process.py: server_command, support/other_server.py: compare_flags; "
           "test_a_server_that_does_not_fit_is_refused_in_one_line_before_it_is_touched",
     flags=("inference.args.logprobs_mode=raw_logprobs",))
def raw_logprobs():
    """The server reports logprobs of the raw model, before the temperature that it samples with."""
    return []


@row(met_in="huggingface/trl#3029", twin="healthy-at-0-7", options=("temperature=0.7",),
     guard="loss.py: token_logprobs, support/check.py: server; "
           "test_chunked_logprobs_equal_log_softmax_with_its_gradients")
def temperature_forgotten():
    """The trainer's softmax leaves out the temperature at which the completions were sampled."""
    def at_one(init, policy, *args):
        init(policy, *args)
        policy.temperature = 1.0

    return [around(Policy, "__init__", at_one)]


@row(met_in="NVIDIA-NeMo/RL#3497, OpenPipe/ART#140",
     guard="rollout.py: sampling, support/check.py: server; "
           "test_no_default_of_model_or_server_bends_the_distribution",
     flags=(f"inference.args.override_generation_config={BENT}",))
def generation_config():
    """Sampling parameters that a request leaves open are those of the generation_config.json."""
    def sparse(init, generator, *args, **kwargs):
        init(generator, *args, **kwargs)
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            del generator.sampling[name]

    return [around(Generator, "__init__", sparse)]


# ---- weights

@row(met_in="huggingface/trl#5312",
     guard="sync.py: send; test_kl_grows_when_the_weights_are_never_synced")
def never_synced():
    """Updates of the server succeed, but bring it the weights that it had from the beginning."""
    first = {}

    def frozen(full_weights, policy):
        for name, tensor in full_weights(policy).items():
            first.setdefault(name, tensor.clone())
        return first

    return [around(Policy, "full_weights", frozen)]


@row(met_in="vllm-project/vllm#51665, PrimeIntellect-ai/prime-rl#2823",
     guard="sync.py: keeps_a_head; test_a_tied_head_is_sent_if_the_files_have_it")
def tied_head_not_sent():
    """A head that is tied to the embedding is not sent by itself, and the server keeps the old one."""
    return [around(Server, "keeps_a_head", lambda *_: False)]


def keeping(*routes: str):
    """A patch: the server is not told to empty these caches, and does not while it is paused."""
    def call(original, server, route, *args, **kwargs):
        if route.partition("?")[0] in routes:
            return {}
        return original(server, route.replace("=keep", "=keep&clear_cache=false"), *args, **kwargs)

    return around(Server, "call", call)


@row(met_in="huggingface/trl#7198, vllm-project/vllm#44910", twin="healthy-64-prompts",
     options=("env.args.num_train=64",), guard="sync.py: send; GUARD_ENCODER")
def old_encoder_cache():
    """Features of images that the old vision tower made stay in the server's encoder cache."""
    return [keeping("reset_mm_cache", "reset_encoder_cache")]


@row(met_in="NVIDIA-NeMo/RL#4018, vllm-project/vllm#9744", twin="healthy-64-prompts",
     options=("env.args.num_train=64",), guard="sync.py: send; GUARD_PREFIX")
def old_prefix_cache():
    """Keys and values that the old weights made of a prompt stay in the server's prefix cache."""
    return [keeping("reset_prefix_cache")]


@row(met_in="areal-project/AReaL#1634", twin="healthy-slow", options=("learning_rate=5e-5",),
     guard="policy.py: Policy; test_a_bf16_checkpoint_is_trained_in_fp32")
def bf16_weights():
    """The trainer's own weights are bf16, in which most of a small update rounds to nothing."""
    def rounded(step, optimizer, *args, **kwargs):
        step(optimizer, *args, **kwargs)
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.copy_(p.bfloat16())

    return [around(torch.optim.AdamW, "step", rounded)]


# ---- loss and rewards

@row(met_in="PrimeIntellect-ai/prime-rl#583", twin="healthy-small-batches",
     options=("micro_batch_size=16",),
     guard="loss.py: grpo_loss; test_micro_batches_add_up_to_the_full_gradient")
def mean_per_micro_batch():
    """The loss of each micro-batch is a mean over its own tokens, and the step a mean of these."""
    def own_means(gradients, trainer, turns, *rest):
        count = sum(len(chunk.pieces(trainer.config.micro_batch_size)) for [chunk] in turns)

        def own_mean(loss, *tensors, num_tokens=0, **options):
            mask = tensors[4]
            return loss(*tensors[:5], num_tokens=mask.sum().item() * count, **options)

        with around(train, "grpo_loss", own_mean):
            return gradients(trainer, turns, *rest)

    return [around(MultimodalGRPOTrainer, "gradients", own_means)]


@row(met_in="StarsfieldAI/R1-V#67",
     guard="loss.py: group_advantages; "
           "test_groups_by_names_and_rewards_as_dicts_train_the_same")
def wrong_groups():
    """Rewards are compared with those of other prompts: completion i is put into group i modulo P."""
    def dealt_out(group_advantages, rewards, groups, *rest):
        return group_advantages(rewards, torch.arange(len(rewards)) % len(groups.unique()), *rest)

    return [around(train, "group_advantages", dealt_out)]


@row(met_in="huggingface/trl#6427, Tencent-Hunyuan/UniRL#214", twin="healthy-with-failures",
     guard="rollout.py: score; test_a_bad_reward_drops_its_completion_alone")
def failures_as_zero():
    """A completion whose judge failed gets a reward of 0, as if the judge had found it wrong."""
    def zero(accuracy, *args, **info):
        with contextlib.suppress(TimeoutError):
            return failing(accuracy, *args, **info)
        return 0.0

    return [around(colors, "accuracy", zero)]


# ---- a run

def silenced() -> list:
    """Patches: no alarm of this trainer stops a run. What is measured is still said.

    Where processor and server read a prompt otherwise the trainer takes its own tokens, and where
    logprobs are missing zeros: what trainers do that do not look.
    """
    def trusting(build_batch, adapter, outputs):
        for row, encoded in enumerate(outputs.encoded):
            outputs.prompt_ids[row] = encoded["input_ids"][0].tolist()
        for row, ids in enumerate(outputs.completion_ids):
            logprobs = outputs.completion_logprobs[row] + [0.0] * len(ids)
            outputs.completion_logprobs[row] = logprobs[:len(ids)]
        return build_batch(adapter, outputs)

    def heard(server, *args, must_agree):
        return server(*args, must_agree=False)

    return [around(check, "forward", lambda *_: {}), around(check, "sharing", lambda *_: None),
            around(check, "server", heard),
            around(other_server, "compare_flags", lambda *_: None),
            around(adapter_module, "check_places", lambda *_: None),
            around(MultimodalAdapter, "as_served", lambda _, adapter, encoded, *rest: encoded),
            around(MultimodalAdapter, "build_batch", trusting)]


@contextlib.contextmanager
def patched(patches: list):
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def run(row: Row, way: str, config) -> dict:
    """One run against the server at config.url; its raw line."""
    start, said, ended, trainer, metrics = time.perf_counter(), [], "", None, []
    random.seed(config.seed)
    with patched(silenced()), train.served(config) as first:
        first.ensure_server()  # with the weights of the beginning, whoever used it before
    note = mock.patch.object(tqdm, "write", lambda text, **_: said.append(text))
    with contextlib.ExitStack() as alive:
        try:
            alarms = silenced() if way == SILENCED else []
            # Those of the bug come first, and so the silenced checks are asked after it.
            with note, patched(row.patches()), patched(alarms):
                trainer = alive.enter_context(train.served(config))
                trainer.train()
        except Exception as error:  # an alarm's, or that of what the bug broke
            ended = re.sub(r"http://\S+?(:| |$)", r"the server\1", describe(error))[:400]
        accuracy = None
        if trainer and trainer.step:
            accuracy = round(held_out_accuracy(trainer), 4)
            path = config.run_dir / "metrics.jsonl"
            metrics = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in metrics if "loss" in line]
    record = {"bug": row.name, "way": way, "seed": config.seed, "steps": len(steps),
              "ended": ended, "said": next((text for text in said if "differ by" in text), ""),
              "kl_warnings": [int(text.split()[1].rstrip(":")) for text in said
                              if "mismatch KL" in text],
              "logged_accuracy": [line["eval/accuracy"] for line in metrics
                                  if "eval/accuracy" in line],
              "accuracy": accuracy, "wall_seconds": round(time.perf_counter() - start, 1)}
    for name in ("kl", "reward", "masked_fraction", "completion_length", "dropped"):
        record[name] = [float(f"{line[name]:.3g}") for line in steps]
    return record


def held_out_accuracy(trainer) -> float:
    """That of the trained policy, without the bug: its own weights, sampled and scored as it should."""
    trainer.server.engine = None  # meet anew, and agree anew on which weights are sent
    trainer.gather_weights()
    trainer.server.send(trainer.source)
    generator = Generator(colors.load_environment(), trainer.config,
                          vision_token_ids(trainer.model.config), decode=trainer.tokenizer.decode)
    return generator.evaluate(trainer.config.eval_samples).means()["reward"]


def config_of(folder: str, port: int, *words: str):
    return load_config(str(ROOT / "config.toml"), [f"output_dir={folder}", "run_name=zoo",
                                                   f"vllm_server_port={port}", *words])


def run_rows(names: list[str], args) -> None:
    """Run these rows, all that share a server on one; add their raw lines."""
    rows = sorted((ZOO[name] for name in names), key=lambda row: row.flags)
    for flags, alike in itertools.groupby(rows, key=lambda row: row.flags):
        port = args.port
        if flags:  # not the one that may be up
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            with Server(config_of(folder, port, *flags)) as server:
                server.lease.release()  # the rows come one after the other
                for row in alike:
                    config = config_of(folder, port, f"max_steps={args.steps}",
                                       f"eval_every_steps={args.steps}", f"seed={args.seed}",
                                       *row.options)
                    found = [run(row, AS_A_USER, config)]
                    if found[0]["ended"]:
                        found.append(run(row, SILENCED, config))
                    keep(found)


# ---- what came out

def records() -> list[dict]:
    return [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.exists() else []


def keep(found: list[dict]) -> None:
    """Add raw lines in the place of those of the same bug and seed."""
    new = {(record["bug"], record["seed"]) for record in found}
    kept = [record for record in records() if (record["bug"], record["seed"]) not in new] + found
    kept.sort(key=lambda record: (list(ZOO).index(record["bug"]), record["seed"]))
    RAW.write_text("".join(json.dumps(record) + "\n" for record in kept))
    for record in found:
        print(json.dumps({key: value for key, value in record.items()
                          if not isinstance(value, list)}), flush=True)


ALARMS = {  # what an error says -> what it is called in the table
    "These are different policies": "start-up check",
    "logprobs_mode": "flags of the server",
    "the chat template writes": "places of images",
    "processor and server (": "prompt ids",
    "one logprob for each sampled": "lengths of ids and logprobs",
    "Image features and image tokens": "error of transformers"}


def alarm(record: dict) -> str:
    """Which alarm fired in a run, and at which step."""
    if record["ended"]:
        names = [name for text, name in ALARMS.items() if text in record["ended"]]
        name = names[0] if names else record["ended"][:60].replace("|", "/")
        return f"**{name}** stops it in step {record['steps'] + 1}"
    warnings = record["kl_warnings"]
    if warnings:
        return f"`kl` warns from step {warnings[0]} on, in {len(warnings)} of {record['steps']}"
    return "none"


def cells(row: Row, user: dict, silent: dict | None, twin: dict) -> list[str]:
    """A line of the table; what a run without alarms saw is that of the silenced run, if any."""
    last = silent or user
    found = [f"`{row.name}`", alarm(user), alarm(silent) if silent else ""]
    if not last["steps"]:
        return found + ["-"] * 4
    logged = "-" if last["ended"] else f"{last['logged_accuracy'][-1]:.3f}"
    return found + [f"{last['kl'][0]:.0e}, {max(last['kl']):.0e}", logged,
                    f"{last['accuracy']:.3f}", f"{twin['accuracy']:.3f}" if row.met_in else ""]


def table(found: list[dict]) -> str:
    """What happened, of seed 0."""
    lines = ["| run | alarm | alarms silenced | `kl`: first, largest | accuracy, as logged "
             "| of the policy | of its twin |", "|---|---|---|---|---|---|---|"]
    by_name = {(record["bug"], record["way"]): record for record in found if record["seed"] == 0}
    for name, row in ZOO.items():
        if (name, AS_A_USER) in by_name:
            line = cells(row, by_name[name, AS_A_USER], by_name.get((name, SILENCED)),
                         by_name[row.twin, AS_A_USER])
            lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def causes() -> str:
    """What each bug is, where it was met, and what keeps it out."""
    lines = ["| bug | cause | met in | kept out by |", "|---|---|---|---|"]
    for name, row in ZOO.items():
        links = re.sub(r"([\w./-]+)#(\d+)", r"[\1#\2](https://github.com/\1/issues/\2)", row.met_in)
        if row.met_in:
            lines.append(f"| `{name}` | {row.cause} | {links} | {row.guard} |")
    return "\n".join(lines)


def with_tables(text: str, found: list[dict]) -> str:
    """The document with both tables made anew."""
    for name, lines in (("zoo", table(found)), ("causes", causes())):
        text = re.sub(f"(<!-- {name} -->\n).*?(\n<!-- end -->)",
                      lambda match: match[1] + lines + match[2], text, flags=re.S)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(ZOO))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--table", action="store_true", help="only write docs/zoo.md anew")
    args = parser.parse_args()
    if not args.table:
        run_rows(args.names or list(ZOO), args)
    DOC.write_text(with_tables(DOC.read_text(), records()))


if __name__ == "__main__":
    main()

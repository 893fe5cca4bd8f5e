"""A zoo of silent bugs: each put into the default run on purpose, and what becomes of it.

    python bench/zoo.py [name ...] [--seed 0] [--steps 60] [--port 8000]     (or python -m bench.zoo)
    python bench/zoo.py --table                        only write the tables of docs/zoo.md anew

All of them are bugs that somebody has met in training by RL. A function below puts each into this
trainer, by patching it in a process of its own; nothing of it is in the modules. Every bug is run
twice: as a user would meet it, and, where that run is refused or breaks off, once more with all
alarms silenced, to see what a trainer without them would have made of it. Beside the bugs stand
runs without one, with the settings that a bug needs to show at all: their twins.

A row uses the server that is up at the port, or starts one for all rows; bugs of the server get one
with other flags. Raw lines: results/zoo.jsonl, the newest of each bug, seed and way.
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
import subprocess
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

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import adapter as adapter_module  # noqa: E402  (needs the path)
import policy as policy_module  # noqa: E402
import train  # noqa: E402
from adapter import MultimodalAdapter  # noqa: E402
from envs import colors  # noqa: E402
from policy import Policy  # noqa: E402
from rollout import GenerateOutputs, Generator, Rollout  # noqa: E402
from support import check, other_server  # noqa: E402
from support.config import load_config  # noqa: E402
from support.text import describe  # noqa: E402
from sync import Server  # noqa: E402

RAW, DOC = ROOT / "results" / "zoo.jsonl", ROOT / "docs" / "zoo.md"
CHECK = "support/check.py: server"
TRAINER = train.MultimodalGRPOTrainer


@dataclass(frozen=True)
class Bug:
    """A row of the zoo. The docstring of `patches`, which puts the bug in, says its cause."""
    patches: Callable[[], list]
    met_in: str = ""         # issues or pull requests where somebody met it
    guard: str = ""          # what keeps it out of this trainer: code, and a test
    twin: str = "healthy"    # the run without the bug, of the same settings
    options: tuple = ()      # overrides of config.toml
    flags: tuple = ()        # of the server, as overrides; the trainer does not know of them

    @property
    def name(self) -> str:
        return self.patches.__name__.replace("_", "-")

    @property
    def cause(self) -> str:
        return " ".join(self.patches.__doc__.split())


ZOO: dict[str, Bug] = {}


def bug(**fields):
    """Enters a function that returns patches into the zoo."""
    def enter(patches):
        found = Bug(patches, **fields)
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

@bug()
def healthy():
    """The default run as it is."""
    return []


@bug(options=("temperature=0.7",))
def healthy_at_0_7():
    """At temperature 0.7."""
    return []


@bug(options=("temperature=1.5",))
def healthy_at_1_5():
    """At temperature 1.5, where one completion in six is none of the four words."""
    return []


@bug(options=("env.args.num_train=64",))
def healthy_64_prompts():
    """64 prompts, so that the server sees each picture again after four steps."""
    return []


@bug(options=("learning_rate=5e-5",))
def healthy_slow():
    """At a tenth of the learning rate."""
    return []


@bug()
def healthy_with_failures():
    """A judge that fails in 3 of 10 calls; what it failed at is dropped."""
    return [around(colors, "accuracy", failing)]


def failing(accuracy, completion: str, answer: str, **info) -> float:
    if random.random() < 0.3:
        raise TimeoutError("the judge is busy")
    return accuracy(completion, answer, **info)


# ---- images

@bug(met_in="unslothai/unsloth#6960, unslothai/unsloth#11031",
     guard=f"{CHECK}; test_a_changed_pixel_changes_the_logprobs")
def lost_pixels():
    """The pixels get lost on the trainer's side: it scores answers to pictures that it never saw."""
    def blind(build_batch, adapter, outputs):
        batch = build_batch(adapter, outputs)
        return batch.with_fields(pixel_values=None, extra_model_kwargs={}, image_rows={})

    return [around(MultimodalAdapter, "build_batch", blind)]


@bug(met_in="om-ai-lab/VLM-R1#263, unslothai/unsloth#11031",
     guard=f"batch.py: images_of, {CHECK}; test_every_row_keeps_its_own_pixels")
def another_image():
    """Images are shifted by a row: each prompt is scored with the next picture of the same size."""
    def shifted(build_batch, adapter, outputs):
        batch = build_batch(adapter, outputs)
        pieces = list(batch.pixel_values.split(batch.image_rows["pixel_values"]))
        places = {}  # by size
        for place, grid in enumerate(batch.extra_model_kwargs["image_grid_thw"].tolist()):
            places.setdefault(tuple(grid), []).append(place)
        moved = list(pieces)
        for same_size in places.values():
            for to, source in zip(same_size, same_size[1:] + same_size[:1]):
                moved[to] = pieces[source]
        return batch.with_fields(pixel_values=torch.cat(moved))

    return [around(MultimodalAdapter, "build_batch", shifted)]


@bug(met_in="huggingface/trl#6294, PrimeIntellect-ai/prime-rl#1739",
     guard="adapter.py: check_places, as_served; test_a_template_has_one_place_for_each_image")
def expanded_twice():
    """A prompt whose image placeholder was expanded already goes through the processor again."""
    def twice(encode_text, adapter, text, images):
        once = encode_text(adapter, text, images)
        return encode_text(adapter, adapter.tokenizer.decode(once["input_ids"][0]), images)

    return [around(MultimodalAdapter, "encode_text", twice)]


@bug(met_in="StarsfieldAI/R1-V#103",
     guard="adapter.py: as_served, processor_options; test_a_prompt_that_the_server_read_"
           "differently_is_refused",
     flags=('inference.args.mm_processor_kwargs={"size": {"shortest_edge": 784, '
            '"longest_edge": 3136}}',))
def other_pixel_limits():
    """The server shrinks images to a limit that the trainer's processor does not have."""
    return []


@bug(met_in="huggingface/trl#5277", guard=f"support/token_types.py: with_token_types, {CHECK}; "
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

@bug(met_in="rllm-org/rllm#816, huggingface/trl#5224", twin="healthy-at-1-5",
     options=("temperature=1.5",),
     guard="rollout.py keeps ids; adapter.py: build_batch; test_every_turn_is_trained_as_it_was_"
           "sampled")
def retokenised():
    """Completions are trained as the tokens of their text, not as the tokens that were sampled."""
    def from_text(build_batch, adapter, outputs):
        tokenizer = adapter.tokenizer
        for row, ids in enumerate(outputs.completion_ids):
            end = [tokenizer.eos_token_id] * (outputs.finish_reason[row] == "stop")
            text = tokenizer.decode(ids[:len(ids) - len(end)])
            outputs.completion_ids[row] = tokenizer(text)["input_ids"] + end
            outputs.completion_mask[row] = [1] * len(outputs.completion_ids[row])
        return build_batch(adapter, outputs)

    return [around(MultimodalAdapter, "build_batch", from_text)]


@bug(met_in="StarsfieldAI/R1-V#91, verl-project/verl#3469", twin="healthy-at-1-5",
     options=("temperature=1.5",),
     guard="policy.py: vision_token_ids, ban; batch.py: cut_at; test_a_sampled_image_token_does_"
           "no_harm")
def sampled_placeholders():
    """Nothing keeps the policy from sampling an image placeholder, for which there is no image."""
    return [around(policy_module, "vision_token_ids", lambda *_: []),
            around(Policy, "ban", lambda *_: None)]


@bug(met_in="huggingface/trl#6357, huggingface/trl#1623",
     guard="adapter.py: masks from lengths; test_the_end_token_is_trained_also_when_it_is_the_"
           "padding")
def end_masked():
    """The pad token is the end token, and the loss mask, made of "is not padding", leaves it out."""
    def without_ends(build_batch, adapter, outputs):
        batch = build_batch(adapter, outputs)
        trained = batch.input_ids != adapter.tokenizer.eos_token_id
        return batch.with_fields(loss_mask=batch.loss_mask * trained)

    return [around(MultimodalAdapter, "build_batch", without_ends)]


# ---- sampling

@bug(met_in="huggingface/trl#4159", twin="healthy-at-0-7", options=("temperature=0.7",),
     guard=f"support/vllm_process.py: server_command, support/other_server.py: compare_flags, "
           f"{CHECK}; test_a_server_that_does_not_fit_is_refused_in_one_line_before_it_is_touched",
     flags=("inference.args.logprobs_mode=raw_logprobs",))
def raw_logprobs():
    """The server reports logprobs of the raw model, before the temperature that it samples with."""
    return []


@bug(met_in="huggingface/trl#3029, NVIDIA-NeMo/RL#316", twin="healthy-at-0-7",
     options=("temperature=0.7",),
     guard=f"policy.py: Policy, {CHECK}; test_chunked_logprobs_equal_log_softmax_with_its_gradients")
def temperature_forgotten():
    """The trainer's softmax leaves out the temperature at which the completions were sampled."""
    def at_one(init, policy, *args):
        init(policy, *args)
        policy.temperature = 1.0

    return [around(Policy, "__init__", at_one)]


@bug(met_in="NVIDIA-NeMo/RL#3497, OpenPipe/ART#140",
     guard=f"rollout.py: Generator.sampling, {CHECK}; test_no_default_of_model_or_server_bends_the_"
           "distribution",
     flags=('inference.args.override_generation_config={"repetition_penalty": 1.1, "top_k": 20}',))
def generation_config():
    """Sampling parameters that a request leaves open are those of the generation_config.json."""
    def sparse(init, generator, *args, **kwargs):
        init(generator, *args, **kwargs)
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            del generator.sampling[name]

    return [around(Generator, "__init__", sparse)]


# ---- weights

@bug(met_in="huggingface/trl#5312",
     guard="sync.py: Server.send; kl; test_kl_grows_when_the_weights_are_never_synced")
def never_synced():
    """Updates of the server succeed, but bring it the weights that it had from the beginning."""
    first = {}

    def frozen(full_weights, policy):
        for name, tensor in full_weights(policy).items():
            first.setdefault(name, tensor.clone())
        return first

    return [around(Policy, "full_weights", frozen)]


@bug(met_in="vllm-project/vllm#51665 (review), PrimeIntellect-ai/prime-rl#2823 (review)",
     guard="sync.py: keeps_a_head; kl; test_a_tied_head_is_sent_if_the_files_have_it")
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


@bug(met_in="huggingface/trl#7198, vllm-project/vllm#44910", twin="healthy-64-prompts",
     options=("env.args.num_train=64",), guard="sync.py: Server.send; kl")
def old_encoder_cache():
    """Features of images that the old vision tower made stay in the server's encoder cache."""
    return [keeping("reset_mm_cache", "reset_encoder_cache")]


@bug(met_in="vllm-project/vllm#9744, NVIDIA-NeMo/RL#4018", twin="healthy-64-prompts",
     options=("env.args.num_train=64",), guard="sync.py: Server.send; kl")
def old_prefix_cache():
    """Keys and values that the old weights made of a prompt stay in the server's prefix cache."""
    return [keeping("reset_prefix_cache")]


@bug(met_in="NVIDIA-NeMo/Automodel#3444, areal-project/AReaL#1634", twin="healthy-slow",
     options=("learning_rate=5e-5",),
     guard="policy.py: Policy.__init__; test_a_bf16_checkpoint_is_trained_in_fp32")
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

@bug(met_in="PrimeIntellect-ai/prime-rl#583, verl-project/verl#7200",
     options=("micro_batch_size=16",),
     guard="loss.py: grpo_loss's num_tokens; test_micro_batches_add_up_to_the_full_gradient")
def mean_per_micro_batch():
    """The loss of each micro-batch is a mean over its own tokens, and the step a mean of these."""
    def own_means(gradients, trainer, turns, *rest):
        def own_mean(loss, logprobs, entropies, behavior, advantages, mask, num_tokens, **options):
            return loss(logprobs, entropies, behavior, advantages, mask, mask.sum() * len(turns),
                        **options)

        with around(train, "grpo_loss", own_mean):
            return gradients(trainer, turns, *rest)

    return [around(TRAINER, "gradients", own_means)]


@bug(met_in="XU-YIJIE/grpo-flat#2, dllm-reasoning/d1#19",
     guard="train.py: build_batch, by example_id; test_groups_by_names_and_rewards_as_dicts_train_"
           "the_same")
def wrong_groups():
    """Rewards are compared with those of other prompts: completion i is put into group i modulo P."""
    def dealt_out(group_advantages, rewards, groups, *rest):
        return group_advantages(rewards, torch.arange(len(rewards)) % len(groups.unique()), *rest)

    return [around(train, "group_advantages", dealt_out)]


@bug(met_in="rllm-org/rllm#710, NVIDIA-NeMo/RL#2207", twin="healthy-with-failures",
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

    return [around(check, "forward", lambda *_: {}), around(check, "sharing", lambda *_: None),
            around(check, "server", lambda original, *args, must_agree: original(
                *args, must_agree=False)),
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


def run(row: Bug, way: str, config) -> dict:
    """One run in this process, against the server at config.url; its raw line."""
    random.seed(config.seed)
    start, said, ended, trainer = time.perf_counter(), [], "", None
    with patched(silenced()), train.served(config) as first:  # whoever used the server before
        first.ensure_server()
    note = mock.patch.object(tqdm, "write", lambda text, **_: said.append(text))
    alarms = [] if way == "as a user" else silenced()
    try:
        with note, patched(alarms), patched(row.patches()), train.served(config) as trainer:
            trainer.train()
    except Exception as error:  # of an alarm, or of what the bug broke
        ended = re.sub(r"http://\S+?(:| |$)", r"the server\1", describe(error))
    path = config.run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line for line in lines if "loss" in line]
    record = {"bug": row.name, "way": way, "seed": config.seed, "steps": len(steps),
              "ended": ended[:400],
              "start": next((text for text in said if "trainer and server" in text), None),
              "kl_alarms": [int(text.split()[1].rstrip(":")) for text in said
                            if "mismatch KL" in text],
              "not_shared": any("not shared" in text for text in said),
              "seen": [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]}
    for name in ("kl", "reward", "grad_norm", "masked_fraction", "zero_advantage_groups",
                 "dropped", "completion_length"):
        record[name] = [float(f"{line[name]:.4g}") for line in steps]
    if steps:
        record["accuracy"] = round(exact_accuracy(trainer), 4)
    return {**record, "wall_seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time(), 1)}


def exact_accuracy(trainer) -> float:
    """The mean probability of the right answer, of the trained policy on the held-out pictures.

    It is what held-out accuracy estimates if nothing is wrong with sampling, weights or rewards.
    """
    adapter, policy, rollouts = trainer.adapter, trainer.policy, []
    for index, row in enumerate(colors.load_environment().eval):
        images = [row["prompt"][0]["content"][0]["image"]]
        answer = adapter.token_ids(row["answer"]) + [adapter.tokenizer.eos_token_id]
        rollouts.append(Rollout(
            prompt=row["prompt"], completion=row["answer"], answer=row["answer"], state={}, info={},
            example_id=index, reward=1.0, metrics={}, completion_ids=answer, images=images,
            prompt_ids=adapter.encode(row["prompt"], images)["input_ids"][0].tolist(),
            completion_logprobs=[0.0] * len(answer), finish_reason="stop"))
    batch = adapter.build_batch(GenerateOutputs.from_rollouts(rollouts))
    policy.temperature = trainer.config.temperature  # whatever the bug has made of it
    with torch.no_grad():
        logprobs, _ = policy(batch, share=False)
    return logprobs.sum(1).exp().mean().item()


def run_in_a_process(row: Bug, way: str, port: int, args) -> dict:
    """The same in a process of its own, whose last line is the raw line."""
    command = [sys.executable, __file__, row.name, "--child", way, "--port", str(port),
               "--seed", str(args.seed), "--steps", str(args.steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


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
                    found = [run_in_a_process(row, "as a user", port, args)]
                    if found[0]["ended"]:
                        found.append(run_in_a_process(row, "silenced", port, args))
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
                          if not isinstance(value, list) or len(value) < 8}), flush=True)


ALARMS = {  # what an error says -> what it is called in the table
    "These are different policies": "start-up check",
    "logprobs_mode": "flags of the server",
    "the chat template writes": "places of images",
    "processor and server (": "prompt ids",
    "one logprob for each sampled": "lengths of ids and logprobs",
    "Image features and image tokens": "error of transformers",
}


def alarm(record: dict) -> str:
    """Which alarm fired in a run, and after which step."""
    if record["ended"]:
        names = [name for text, name in ALARMS.items() if text in record["ended"]]
        return f"**{(names or [record['ended'][:60]])[0]}**, refused in step {record['steps'] + 1}"
    if record["kl_alarms"]:
        return f"`kl`, in {len(record['kl_alarms'])} steps from step {record['kl_alarms'][0]}"
    return "none"


def table(found: list[dict]) -> str:
    """What happened, of seed 0."""
    lines = ["| bug | alarm | without it | `kl` of step 1, largest | accuracy as logged "
             "| of the policy | of its twin |", "|---|---|---|---|---|---|---|"]
    by_name = {(r["bug"], r["way"]): r for r in found if r["seed"] == 0}
    for name, row in ZOO.items():
        user, silent = by_name.get((name, "as a user")), by_name.get((name, "silenced"))
        if user is None:
            continue
        last = silent or user
        twin = by_name.get((row.twin, "as a user"), {}).get("accuracy", "-")
        kl = f"{last['kl'][0]:.0e}, {max(last['kl']):.0e}" if last["kl"] else "-"
        cells = [f"`{name}`", alarm(user), alarm(silent) if silent else "", kl,
                 f"{last['seen'][-1]:.3f}" if last["seen"] and last["steps"] else "-",
                 f"{last['accuracy']:.3f}" if last["steps"] else "-",
                 "" if row.twin == name or not row.met_in else f"{twin:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def causes() -> str:
    """What each bug is, where it was met, and what keeps it out."""
    lines = ["| bug | cause | met in | kept out by |", "|---|---|---|---|"]
    for name, row in ZOO.items():
        if row.met_in:
            lines.append(f"| `{name}` | {row.cause} | {row.met_in} | {row.guard} |")
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--table", action="store_true", help="only write docs/zoo.md anew")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        row = ZOO[args.names[0]]
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(folder, args.port, f"max_steps={args.steps}", f"seed={args.seed}",
                               *row.options)
            print(json.dumps(run(row, args.child, config)))
        return
    if not args.table:
        run_rows(args.names or list(ZOO), args)
    DOC.write_text(with_tables(DOC.read_text(), records()))


if __name__ == "__main__":
    main()

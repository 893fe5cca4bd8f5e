"""Several trainer processes: FSDP2 over gloo under torchrun must be one process, only sharded."""
import contextlib
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from bench.scaling import on_meta
from conftest import ROOT, canned, free_port, full_weights, make_trainer, noise
from support.checkpoint import is_whole
from test_faults import command, running
from test_runs import metrics
from train import served

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
MIXTURE = [([noise(56, 56)], [2, 6, 3]), ([], [4, 1]),
           ([noise(84, 84), noise(56, 56, 2)], [5, 3, 2])]
CASES = {  # name -> (groups, options of the trainer)
    "a mixture": (MIXTURE, {"micro_batch_size": 2, "learning_rate": 1e-4}),
    "row by row": (MIXTURE, {"share_prompt": False, "max_grad_norm": 0.1, "weight_decay": 0.1}),
    "checkpointed": (MIXTURE, {"gradient_checkpointing": True, "share_prompt": True}),
    "long groups": ([([noise(56, 84)], [3, 6, 2, 4, 1, 2, 5]), ([], [2, 3, 1]),
                     ([noise(84, 56, 1)], [5, 1, 3, 3, 2]), ([noise(56, 56)], [2, 2])],
                    {"micro_batch_size": 2, "share_prompt": True, "learning_rate": 1e-4}),
    "frozen": (MIXTURE, {"freeze_vision": True, "share_prompt": True}),
    "lora": (MIXTURE, {"lora_rank": 4, "learning_rate": 1e-4}),
    "frozen lora": (MIXTURE, {"lora_rank": 4, "freeze_vision": True, "learning_rate": 1e-4}),
    "text only": ([([], [3, 5, 2]), ([], [1, 4])], {}),
    "conversations": (
        [([noise(56, 56)], [2, 4, 3], [[noise(84, 56, 3)], [], [noise(28, 56, 4)]]),
         ([], [3, 1], [[noise(56, 56, 5)]]), ([], [2, 2], [[]]), ([noise(56, 84, 7)], [3, 3])],
        {"micro_batch_size": 2, "learning_rate": 1e-4}),
    "fewer rows than ranks": ([([noise(56, 84)], [3, 2])], {}),
}
THREE_STEPS = """
import dataclasses
import sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import canned, full_weights, make_trainer
from test_sharded import CASES

found = {{}}
for name, (groups, options) in CASES.items():
    trainer = make_trainer(**options)
    outputs = torch.load({folder!r} + f"/{{name}}", weights_only=False)
    lines = [trainer.update(outputs) for _ in range(3)]
    weights = {{key: tensor.clone() for key, tensor in full_weights(trainer.policy).items()}}
    found[name] = (lines, weights, trainer.policy.can_share)
    if "lora" in name or "mixture" in name:  # the fourth step after a resume is that without one
        options = dict(options, output_dir=sys.argv[1] + name + str(trainer.world))
        trainer.config = dataclasses.replace(trainer.config, output_dir=options["output_dir"])
        trainer.save()
        resumed = make_trainer(**options, resume=True)
        steps = [one.update(outputs) for one in (trainer, resumed)]
        assert steps[0]["grad_norm"] == steps[1]["grad_norm"], name
        both = [full_weights(one.policy) for one in (trainer, resumed)]
        assert all(torch.equal(w, both[1][key]) for key, w in both[0].items()), name
if trainer.rank == 0:
    torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> tuple[dict, dict]:
    """Metrics, final weights and can_share of every case, by one process and by two."""
    folder, found = tmp_path_factory.mktemp("sharded"), []
    for name, (groups, _) in CASES.items():
        torch.save(canned(make_trainer(), groups), folder / name)
    script = folder / "steps.py"
    script.write_text(THREE_STEPS.format(root=str(ROOT), folder=str(folder)))
    for start in ([], [*TORCHRUN, "2"]):
        subprocess.run([sys.executable, *start, str(script), str(folder / "found")], check=True,
                       timeout=300)
        found.append(torch.load(folder / "found", weights_only=False))
    return tuple(found)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_take_the_steps_of_one(three_steps, name):
    (one_lines, one, can_share), (two_lines, two, can_share_too) = (f[name] for f in three_steps)
    assert can_share and can_share_too
    for a, b in zip(one_lines, two_lines, strict=True):
        for key in ("loss", "grad_norm", "ir", "kl", "ent", "tokens", "reward"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
    start = full_weights(make_trainer(**CASES[name][1]).policy)
    assert one.keys() == two.keys() == start.keys()
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one)
    changed = {key for key in one if not torch.equal(one[key], start[key])}
    assert changed and any(".visual." in key for key in changed) == (
        "frozen" not in name and name != "text only")


@pytest.mark.slow
def test_two_ranks_train_against_a_real_server_and_go_on_as_one(server, tmp_path):
    """Two nodes of one rank each train; one process goes on, then two ranks.

    These are started by train.py, and are n + m: its server has two data-parallel workers.
    """
    config = dataclasses.replace(server, output_dir=str(tmp_path), eval_every_steps=2)
    options = dict(save_every_steps=2, learning_rate=1e-4, warmup_steps=3)
    own = {"vllm_server_port": free_port(), "inference.args.data_parallel_size": 2}
    nodes = [[*TORCHRUN[:-2], "--nnodes=2", f"--node-rank={i}", "--nproc-per-node=1",
              "--master-addr=127.0.0.1", f"--master-port={free_port()}"] for i in range(2)]
    nodes[1][-1] = nodes[0][-1]
    for name, starts, end, more in (
            ("one", [[]], 4, {}), ("changing", nodes, 2, {}), ("changing", [[]], 3, {}),
            ("changing", [[]], 4, own | {"trainer.gpus": 2})):
        python, *words = command(config, resume="true", **options, run_name=name, max_steps=end,
                                 **more)
        env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with contextlib.ExitStack() as stack:
            runs = [stack.enter_context(running([python, *start, *words], env=env))
                    for start in starts]
            assert [run.wait(400) for run in runs] == [0] * len(runs)
    one, other = (metrics(dataclasses.replace(config, run_name=name))
                  for name in ("one", "changing"))
    assert [line["step"] for line in other] == [line["step"] for line in one] == [
        0, 1, 2, 2, 3, 4, 4]
    assert all(line.get("kl", 0) < 1e-6 for line in other)  # the server has the gathered weights
    for key in ("reward", "loss", "grad_norm", "lr"):
        assert [line[key] for line in other if key in line] == pytest.approx(
            [line[key] for line in one if key in line], rel=1e-3, abs=1e-5), key
    paths = [tmp_path / name / "checkpoint-4" for name in ("one", "changing")]
    assert all(map(is_whole, paths))
    models = [make_trainer(str(path)).model.parameters() for path in paths]
    assert all((p - q).abs().max() < 1e-5 for p, q in zip(*models, strict=True))


def test_lora_leaves_the_base_alone_and_the_server_gets_the_sum(server, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=3, lora_rank=4,
                                 learning_rate=1e-3, save_every_steps=2)
    with served(config) as trainer:
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(".lora_" in name for name in changed)
    assert all(line["kl"] < 1e-6 for line in metrics(config))
    folder = tmp_path / "colors" / "checkpoint-3"
    merged = make_trainer(str(folder)).model.state_dict()  # a plain model, for vLLM too
    sums = full_weights(trainer.policy)
    assert all((merged[n] - w).abs().max() < 1e-6 for n, w in sums.items())
    again = dataclasses.replace(config, resume=str(tmp_path / "colors" / "checkpoint-2"))
    with served(again) as resumed:
        resumed.train()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(),
                                                 resumed.model.parameters()))
    for rank in (0, 8):
        with pytest.raises(ValueError, match="checkpoint-2 is of another model or lora_rank"):
            make_trainer(**dataclasses.asdict(again) | {"lora_rank": rank})
    plain = make_trainer(output_dir=str(tmp_path))
    plain.records.open(plain.past_metrics)
    plain.step = 1
    plain.save()
    with pytest.raises(ValueError, match="checkpoint-1 is of another model or lora_rank"):
        make_trainer(output_dir=str(tmp_path), resume=True, lora_rank=4)


MEMORY = """
import json
import re
import sys
from pathlib import Path
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import full_weights
from policy import Policy
from support.config import MultimodalRLConfig
from support.loading import load_model
from support.ranks import join_ranks, on_lead
from sync import CheckpointSource

def resident(name):  # VmRSS: now; VmHWM: the most since it was reset
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak_above(action, base):
    Path("/proc/self/clear_refs").write_text("5")
    action()
    return resident("VmHWM") - base()

def load():
    global policy
    model, _ = load_model(config)
    policy = Policy(model, config)
    policy.shard()

def send():
    on_lead(lambda: sum(tensor.numel() for _, tensor in source), helper=source)

rank, world = join_ranks()
config = MultimodalRLConfig(model={model!r})
load()  # once, for what allocators and gloo take
found = {{"loading": peak_above(load, lambda: resident("VmRSS"))}}
source = CheckpointSource(policy)
send()
held = resident("VmRSS")
found["sending"] = peak_above(send, lambda: held)
assert not any(t.is_meta for t in [*policy.parameters(), *policy.buffers()])
whole = full_weights(policy)
if rank == 0:
    torch.save(whole, {folder!r} + "/weights")
Path({folder!r}, f"rank-{{rank}}.json").write_text(json.dumps(found))
"""


def test_ranks_hold_no_more_than_a_layer_beside_their_slices(tmp_path):
    """While they load what rank 0 alone reads, and while it sends: a tenth of the model at most."""
    model = on_meta({"hidden_size": 512, "num_hidden_layers": 24, "num_attention_heads": 8,
                     "num_key_value_heads": 2, "intermediate_size": 1536, "vocab_size": 300},
                    {"hidden_size": 512, "embed_dim": 128, "depth": 2, "num_heads": 4}, tied=True)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for number, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(number))
    model.save_pretrained(tmp_path / "model")
    make_trainer().adapter.processor.save_pretrained(tmp_path / "model")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    script = tmp_path / "memory.py"
    script.write_text(MEMORY.format(root=str(ROOT), folder=str(tmp_path),
                                    model=str(tmp_path / "model")))
    # Freed memory goes back to the system at once: counted is what is in use.
    subprocess.run([sys.executable, *TORCHRUN, "3", str(script)], check=True, timeout=300,
                   env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"})
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(3)]
    assert all(ranks["loading"] < 0.1 * size for ranks in found[1:]), (size, found)
    assert all(ranks["sending"] < 0.1 * size for ranks in found), (size, found)
    whole = torch.load(tmp_path / "weights")
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}, {"gradient_checkpointing": True}])
def test_weights_in_host_memory_take_the_same_steps(options, tmp_path):
    plain = make_trainer(**options, learning_rate=1e-4)
    outputs = canned(plain, MIXTURE)
    script = tmp_path / "steps.py"
    script.write_text(OFFLOADED.format(root=str(ROOT), folder=str(tmp_path), options=options))
    torch.save(outputs, tmp_path / "outputs")
    subprocess.run([sys.executable, str(script)], check=True, timeout=300)
    lines, weights, again = torch.load(tmp_path / "found", weights_only=False)
    for line in lines:
        mine = plain.update(outputs)
        for key in ("loss", "grad_norm", "ir", "kl", "ent"):
            assert line[key] == pytest.approx(mine[key], rel=1e-5, abs=1e-6), key
    assert all((weights[n] - w).abs().max() < 1e-6 for n, w in full_weights(plain.policy).items())
    assert all(torch.equal(weights[n], w) for n, w in again.items())  # of the one that resumed


OFFLOADED = """
import sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import full_weights, make_trainer

outputs = torch.load({folder!r} + "/outputs", weights_only=False)
options = dict(**{options!r}, learning_rate=1e-4, cpu_offload=True, output_dir={folder!r})
trainer = make_trainer(**options)
trainer.records.open(None)
lines = []
for step in range(3):
    lines.append(trainer.update(outputs))
    if step == 1:
        trainer.save()
resumed = make_trainer(**options, resume=True)
resumed.update(outputs)
torch.save((lines, full_weights(trainer.policy), full_weights(resumed.policy)), {folder!r} + "/found")
"""


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_a_sharded_model_computes_in_bf16_as_a_whole_one_does(options, tmp_path):
    """As on a GPU, where FSDP casts the weights, and might cast what goes in."""
    torch.save(canned(make_trainer(), MIXTURE), tmp_path / "outputs")
    script = tmp_path / "steps.py"
    script.write_text(IN_BF16.format(root=str(ROOT), folder=str(tmp_path), options=options))
    subprocess.run([sys.executable, str(script)], check=True, timeout=300)
    whole, sharded = torch.load(tmp_path / "found", weights_only=False)
    assert whole["loss"] != sharded["loss"]  # a stream of bf16 is not one of fp32
    assert sharded["loss"] == pytest.approx(whole["loss"], abs=2e-3)
    assert sharded["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.02)
    assert sharded["ent"] == pytest.approx(whole["ent"], rel=0.01)


IN_BF16 = """
import sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import policy
from conftest import make_trainer
from support import check

real = policy.MixedPrecisionPolicy
policy.MixedPrecisionPolicy = lambda dtype, **options: real(torch.bfloat16, **options)
policy.Policy.autocast = lambda self: torch.autocast("cpu", torch.bfloat16)
check.is_exact = lambda policy: False
outputs = torch.load({folder!r} + "/outputs", weights_only=False)
found = []
for offload in (False, True):
    trainer = make_trainer(**{options!r}, cpu_offload=offload)
    found.append(trainer.update(outputs))
    assert trainer.policy.can_share
    assert all(p.grad is None and p.dtype == torch.float32 for p in trainer.model.parameters())
torch.save(found, {folder!r} + "/found")
"""


FAILS = """
import sys
sys.path[:0] = [{root!r}]
from support.config import load_config
from train import served

with served(load_config("config.toml", sys.argv[2:])) as trainer:
    update = trainer.update

    def fragile(outputs):
        if trainer.step == 2 and trainer.rank == 1:
            raise OSError("this rank is gone")
        return update(outputs)

    def judge(completion, answer, **info):
        if trainer.step == 2:
            raise OSError("the judge is gone")
        return 1.0

    if sys.argv[1] == "a rank":
        trainer.update = fragile
    elif trainer.rank == 0:
        trainer.environment.rewards[:] = [judge] * len(trainer.environment.rewards)
    trainer.train()
"""


@pytest.mark.parametrize("what, saved", [("a rank", False), ("the judge", True)])
def test_an_error_of_one_rank_or_of_all_ends_the_run(server, tmp_path, what, saved):
    """With a checkpoint if all ranks had it; that of one rank must not leave the others waiting."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(root=str(ROOT)))
    words = command(dataclasses.replace(server, output_dir=str(tmp_path)))[4:]
    run = subprocess.run([sys.executable, *TORCHRUN, "2", str(script), what, *words], cwd=ROOT,
                         timeout=120, capture_output=True, text=True)
    assert run.returncode == 1 and f"{what.replace('a rank', 'this rank')} is gone" in run.stderr
    checkpoint = tmp_path / "colors" / "checkpoint-2"
    assert is_whole(checkpoint) if saved else not checkpoint.exists()

"""Several trainer processes: FSDP2 over gloo under torchrun must be one process, only sharded."""
import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, canned, make_trainer, noise
from test_faults import command
from test_runs import metrics
from train import is_whole, served

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
GROUPS = {
    "a mixture": [([noise(56, 56)], [2, 6, 3]), ([], [4, 1]),
                  ([noise(84, 84), noise(56, 56, 2)], [5, 3, 2])],
    "text only": [([], [3, 5, 2]), ([], [1, 4])],
    "fewer rows than ranks": [([noise(56, 84)], [3, 2])],
}
STEPS = """
import json, sys
import torch
from torch import distributed
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import make_trainer

if "RANK" in __import__("os").environ:
    distributed.init_process_group()
out, options = sys.argv[1], json.loads(sys.argv[2])
whole = make_trainer(**options)
outputs = whole.on_lead(lambda: torch.load({path!r}, weights_only=False))
lines = [whole.update(outputs) for _ in range(3)]
weights = whole.full_weights()
if whole.rank == 0:
    torch.save({{"lines": lines, "weights": weights, "can_share": whole.can_share}}, out)
"""


def three_steps(tmp_path, name: str, ranks: int, **options) -> dict:
    """Metrics and final weights of three updates on the same completions."""
    path, out = tmp_path / "outputs.pt", tmp_path / f"{ranks}.pt"
    if not path.exists():
        torch.save(canned(make_trainer(), GROUPS[name]), path)
    script = tmp_path / "steps.py"
    script.write_text(STEPS.format(root=str(ROOT), path=str(path)))
    start = [sys.executable] if ranks == 1 else [*TORCHRUN, str(ranks)]
    subprocess.run([*start, str(script), str(out), json.dumps(options)], check=True,
                   timeout=180, cwd=ROOT)
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("name, options", [
    ("a mixture", {"micro_batch_size": 2, "learning_rate": 1e-4}),
    ("a mixture", {"share_prompt": False, "max_grad_norm": 0.1, "weight_decay": 0.1}),
    ("a mixture", {"gradient_checkpointing": True}),
    ("a mixture", {"freeze_vision": True, "share_prompt": True}),
    ("a mixture", {"lora_rank": 4, "learning_rate": 1e-4}),
    ("text only", {}), ("fewer rows than ranks", {}),
])
def test_two_ranks_take_the_steps_of_one(tmp_path, name, options):
    one, two = (three_steps(tmp_path, name, ranks, **options) for ranks in (1, 2))
    assert one["can_share"] == two["can_share"]
    for a, b in zip(one["lines"], two["lines"]):
        for key in ("loss", "grad_norm", "ir", "kl", "ent", "tokens", "reward"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
    assert one["weights"].keys() == two["weights"].keys()
    for key, weight in one["weights"].items():
        assert (weight - two["weights"][key]).abs().max() < 1e-5, key


def test_two_ranks_train_against_a_real_server_and_go_on_as_one(server, tmp_path):
    """train.py starts torchrun by itself; its checkpoint is resumed by one process, and by two."""
    config = dataclasses.replace(server, output_dir=str(tmp_path), eval_every_steps=2)
    options = dict(save_every_steps=2, learning_rate=1e-4, warmup_steps=3)
    for name, steps in (("one", [(1, 4)]), ("two", [(2, 4)]), ("changing", [(2, 2), (1, 3), (2, 4)])):
        for ranks, end in steps:
            words = {**options, "trainer.gpus": ranks, "run_name": name, "max_steps": end}
            subprocess.run(command(config, resume="true", **words), cwd=ROOT, check=True,
                           timeout=180)
    one, two, changing = (metrics(dataclasses.replace(config, run_name=name))
                          for name in ("one", "two", "changing"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [
        0, 1, 2, 2, 3, 4, 4]
    for line in two:
        assert line.get("kl", 0) < 1e-6  # the gathered weights are the ones that the server has
    for lines in (two, changing):
        for key in ("reward", "loss", "grad_norm", "lr"):
            assert [x[key] for x in lines if key in x] == pytest.approx(
                [x[key] for x in one if key in x], rel=1e-3, abs=1e-5), key
    for name in ("two", "changing"):
        assert is_whole(tmp_path / name / "checkpoint-4")
        for p, q in zip(*(make_trainer(str(tmp_path / run / "checkpoint-4")).model.parameters()
                          for run in ("one", name))):
            assert (p - q).abs().max() < 1e-5


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
    assert all((merged[n] - w).abs().max() < 1e-6 for n, w in trainer.full_weights().items())
    again = dataclasses.replace(config, resume=str(tmp_path / "colors" / "checkpoint-2"))
    with served(again) as resumed:
        resumed.train()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(),
                                                 resumed.model.parameters()))

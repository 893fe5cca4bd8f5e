"""What the configs say of memory is what counting on the meta device says; the bench for a GPU runs."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import PARTS
from bench.scaling import PATCHES, PROMPT, activations, count, on_meta, published, state
from conftest import ROOT
from policy import add_adapters, pin, train_in_fp32
from support.config import load_config


def counted(size: str, rank: int) -> tuple[float, float]:
    """(GB of weights, GB of what trains beside them: gradients and two moments) of Qwen2-VL."""
    model = on_meta(*published(size)).to(torch.bfloat16)  # as its files have it
    with torch.device("meta"):
        if rank:
            add_adapters(model, rank)
        train_in_fp32(model, keep_frozen=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights / 1e9, trained / 1e9


def test_the_whole_7b_model_fits_one_gpu_and_host_memory_by_the_sums_that_its_config_states():
    path = ROOT / "configs" / "qwen2-vl-7b.toml"
    config = load_config(str(path))
    assert config.cpu_offload and not config.lora_rank and config.trainer_gpus == 1
    model = on_meta(*published("7B"))
    blocks = [sum(p.numel() for p in module.parameters()) for module in model.modules()
              if type(module).__name__ in model._no_split_modules]
    total = sum(p.numel() for p in model.parameters())
    # At work: weights and gradients in bf16, which are reduced in fp32, from a copy.
    rest, block = (12 * count / 1e9 for count in (total - sum(blocks), max(blocks)))
    weights, trained = counted("7B", 64)
    text = " ".join(path.read_text().replace("\n# ", " ").split())
    for said in (f"{16 * total / 1e9:.1f} GB in host memory", f"{rest:.1f} GB for embeddings",
                 f"{block:.1f} GB for each block", f"{weights:.1f} GB of weights",
                 f"{trained:.1f} GB of gradients and moments"):
        assert said in text, said


@pytest.mark.parametrize("name, size, how, gpus, memory", [
    ("qwen2-vl-2b-24gb", "2B", "LoRA", 1, 24), ("qwen2-vl-2b-shared-gpu", "2B", "all", 1, 80),
    ("qwen2-vl-7b", "7B", "offloaded", 1, 80), ("qwen2-vl-7b-node", "7B", "all", 4, 80),
    ("geometry3k-qwen2.5-vl-7b", "7B", "all", 4, 80), ("qwen2-vl-72b-nodes", "72B", "all", 32, 80)])
def test_a_micro_batch_of_a_config_fits_beside_the_weights(name, size, how, gpus, memory):
    config = load_config(str(ROOT / "configs" / f"{name}.toml"))
    model = count(*published(size))
    group = config.batch_size // config.rollouts_per_step
    prompts = max(1, config.micro_batch_size // group)
    tokens = prompts * PROMPT + config.micro_batch_size * config.max_tokens
    kept = activations(model, tokens, prompts * PATCHES, config.gradient_checkpointing,
                       sharded=gpus > 1 or config.cpu_offload)
    server = config.inference_args["gpu_memory_utilization"] if config.trainer_gpus == 0 else 0
    of_head = 4 * model.head * (how == "offloaded")  # its gradient, before it is reduced
    assert (state(model, how, gpus) + kept + of_head) / 1e9 < memory * (0.9 - server)


@pytest.mark.parametrize("name, size, gpu, rank", [
    ("qwen2-vl-2b-24gb", "2B", 24, 32),
    ("qwen2-vl-2b-shared-gpu", "2B", 80, 0)])
def test_a_config_fits_its_gpu_by_the_sum_that_it_states(name, size, gpu, rank):
    path = ROOT / "configs" / f"{name}.toml"
    config = load_config(str(path))
    assert config.lora_rank == rank and config.trainer_gpus <= 1
    weights, trained = counted(size, rank)
    text = " ".join(path.read_text().replace("\n# ", " ").split())
    assert f"{weights:.1f} GB of weights" in text
    assert f"{trained:.1f} GB of gradients and moments" in text
    sent = weights if rank else 0  # merged, in the type of the files, beside the adapted ones
    server = 0.0
    if config.trainer_gpus == 0:  # its own weights fit in its share
        server = config.inference_args["gpu_memory_utilization"] * gpu
        assert counted(size, 1)[0] < 0.8 * server
    assert weights + trained + sent + server < gpu * 0.9  # the rest is for activations


def test_offloaded_weights_are_pinned_as_long_as_they_live(monkeypatch, capsys):
    pinned, errors = {}, SimpleNamespace(success=object())
    cuda = SimpleNamespace(cudaError=errors, cudaHostUnregister=pinned.pop,
                           cudaHostRegister=lambda start, size, flags:
                           errors.success if pinned.setdefault(start, size) else "no")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)

    class Sharded:  # as a DTensor is
        def __init__(self, tensor):
            self.to_local = lambda: tensor

    tensor = torch.zeros(3, 4)
    parameter = Sharded(tensor)
    pin(parameter)
    assert pinned == {tensor.data_ptr(): 48} and not capsys.readouterr().out
    del parameter
    assert not pinned
    pin(Sharded(torch.zeros(0)))
    assert "0 bytes could not be pinned: no" in capsys.readouterr().out


def test_every_part_of_the_bench_for_a_gpu_runs():
    done = subprocess.run(["bash", "bench/gpu.sh", "--dry"], cwd=ROOT, timeout=300, text=True,
                          capture_output=True, env=os.environ | {"PYTHON": sys.executable})
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line.pop("part"): line for line in lines}
    assert done.returncode == 0 and found.keys() == PARTS.keys(), done.stderr[-2000:]
    assert not any("error" in line for line in lines)
    assert found["exact-fp32"]["largest"] < 1e-5 and found["exact-fp32"]["norm"] < 1e-5
    # The same step in four ways.
    norms = [found[part]["grad_norm"] for part in (
        "step-2b", "step-2b-rows", "step-2b-saving", "step-7b-whole")]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5)
    assert max(found["head"]["plain"]["differences"].values()) < 1e-4
    assert found["gathering"]["gb"] > 0.01

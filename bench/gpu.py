"""What one GPU says of this trainer: `bash bench/gpu.sh` runs all parts, each as

    python bench/gpu.py PART [--dry]

a process of its own with a time limit, so that a part that fails costs no other. It needs torch and
transformers alone (peft for LoRA; the last part vLLM). Random weights in the shapes of Qwen2-VL, one
448x448 image per prompt. Every part appends a line to results/gpu.jsonl, also when it fails. --dry
runs all of them on a CPU in tiny shapes, to see that they run, and writes no line.
"""
import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RAW = ROOT / "results" / "gpu.jsonl"

from bench import scaling, step  # noqa: E402  (needs the path)

SHORT = step.Workload(2, 16, 64)
LONG = step.Workload(2, 32, 512)
TINY = step.Workload(1, 4, 8, prompt_tokens=80)


class Bench:
    """The device and the sizes of a part."""

    def __init__(self, dry: bool):
        self.dry, self.device = dry, "cpu" if dry else "cuda"

    def trainer(self, model: str, workload, dtype=torch.float32, **options):
        """(trainer, rollouts): a model of this size, and what it is to be trained on."""
        from transformers import AutoProcessor

        from adapter import MultimodalAdapter
        from support.config import MultimodalRLConfig
        from train import MultimodalGRPOTrainer
        processor = AutoProcessor.from_pretrained(
            ROOT / "models" / "tiny-qwen2-vl",
            size={"shortest_edge": 28 * 28, "longest_edge": step.SIDE**2})
        adapter = MultimodalAdapter(processor)
        model, workload = ("tiny", TINY) if self.dry else (model, workload)
        made = step.make_model(model, processor.tokenizer, self.device).to(dtype)
        rollouts = step.canned_rollouts(workload, made, adapter)
        if options.get("cpu_offload"):  # what is offloaded is loaded on the CPU
            made.cpu()
        config = MultimodalRLConfig(**{
            "batch_size": len(rollouts), "rollouts_per_step": workload.prompts,
            "micro_batch_size": workload.group, "learning_rate": step.LEARNING_RATE,
            "kl_warning": 1e3, **options})
        trainer = MultimodalGRPOTrainer(made, processor.tokenizer, adapter, config)
        trainer.checked = True  # no server, and its logprobs are those of another precision
        return trainer, rollouts

    def steps(self, model: str, workload, dtype=torch.float32, useful: float = 1.0,
              timed: int = 2, **options) -> dict:
        """Seconds of some steps after a first one, peak memory, and the share of the peak flops.

        useful: the share of the formula's work that has to be done; 0 if it is not to be told.
        """
        from rollout import GenerateOutputs
        trainer, rollouts = self.trainer(model, workload, dtype, **options)
        outputs, seconds, norms = GenerateOutputs.from_rollouts(rollouts), [], []
        if not self.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(1 + timed):
            start = time.perf_counter()
            norms.append(trainer.update(outputs)["grad_norm"])
            self.wait()
            seconds.append(time.perf_counter() - start)
        found = {"seconds": seconds[1:], "peak_gb": step.peak_gb(self.device), "grad_norm": norms[0]}
        tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
        found["tokens_per_second"] = tokens / min(seconds[1:])
        if useful and not self.dry:
            shape = step.MODELS[model]
            counted = scaling.count(shape["text"], shape["vision"], shape.get("tied", True))
            flops = scaling.work(counted, workload.prompts, workload.group, workload.prompt_tokens,
                                 workload.tokens, 1024)
            found["mfu"] = useful * flops / min(seconds[1:]) / scaling.PEAK
        return found

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()


def exactness(bench: Bench, autocast: bool) -> dict:
    """How far sharing prompts moves logprobs and the gradient's norm, in bf16 (autocast) or fp32."""
    from rollout import GenerateOutputs
    from support.check import probe
    trainer, rollouts = bench.trainer("2b", SHORT)
    if not autocast:
        trainer.policy.autocast = contextlib.nullcontext
    batch = trainer.build_batch(GenerateOutputs.from_rollouts(rollouts[:8])).to(trainer.device)
    (alone, norm), (shared, shared_norm) = (probe(trainer.policy, batch, share)
                                            for share in (False, True))
    off = (alone - shared).abs()
    return {"largest": off.max().item(), "mean": off.mean().item(),
            "norm": abs(shared_norm / norm - 1)}


def gathering(bench: Bench) -> dict:
    """Reading all weights of a sharded model, layer by layer, as a sync does: bytes per second."""
    trainer, _ = bench.trainer("2b", TINY, cpu_offload=True)
    seconds, size = [], 0
    for _ in range(2):
        start, size = time.perf_counter(), 0
        for _, tensor in trainer.source:
            size += tensor.numel() * tensor.element_size()
        bench.wait()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "gb": size / 1e9, "gb_per_second": size / 1e9 / seconds[-1]}


def whole(bench: Bench) -> dict:
    """Steps of 7B with offloading; with a frozen vision tower where 140 GB of host memory lack."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    frozen = host < 140e9 and not bench.dry
    found = bench.steps("7b", LONG, cpu_offload=True, micro_batch_size=64, freeze_vision=frozen,
                        timed=1, **SAVING)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "freeze_vision": frozen, "host_gb": host / 1e9, "used_host_gb": used / 1e9}


def head(bench: Bench) -> dict:
    """The head alone, in chunks against full logits."""
    size = (64, 32) if bench.dry else (4096, 3584)
    return {side: step.run_head(side, *size, bench.device) for side in ("chunked", "plain")}


def with_server(bench: Bench) -> dict:
    """Three steps of the default task against a vLLM server, over CUDA IPC, or NCCL on two GPUs."""
    if bench.dry:
        return {"skipped": "the tests train against a server"}
    try:
        import vllm
    except ImportError:
        return {"skipped": "there is no vLLM"}
    found = {"vllm": vllm.__version__}
    for route, gpus in {"ipc": 0, "nccl": 1}.items():
        if torch.cuda.device_count() <= gpus:
            continue
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "train.py", "@", "config.toml", "inference.gpus=1",
                 f"trainer.gpus={gpus}", "inference.args.gpu_memory_utilization=0.3",
                 "max_steps=3", f"output_dir={folder}"], cwd=ROOT, check=True, timeout=400)
            lines = Path(folder, "colors", "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines if '"kl"' in line]
        found[route] = {key: [line[key] for line in steps] for key in ("kl", "seconds_sync")}
    return found


# Weights that do not train need no gradient of their own: a third less work.
LORA = {"lora_rank": 64, "dtype": torch.bfloat16, "micro_batch_size": 8, "useful": 2 / 3}
SAVING = {"gradient_checkpointing": True, "share_prompt": True}
PARTS = {
    "exact-fp32": lambda bench: exactness(bench, autocast=False),
    "exact-bf16": lambda bench: exactness(bench, autocast=True),
    "step-2b": lambda bench: bench.steps("2b", SHORT, share_prompt=True),
    "step-2b-rows": lambda bench: bench.steps("2b", SHORT, useful=0, share_prompt=False,
                                              micro_batch_size=4),
    "step-2b-long": lambda bench: bench.steps("2b", LONG, share_prompt=True, micro_batch_size=8),
    "step-2b-saving": lambda bench: bench.steps("2b", LONG, **SAVING),
    "step-7b-lora": lambda bench: bench.steps("7b", LONG, share_prompt=True, **LORA),
    "step-7b-whole": whole,
    "head": head,
    "gathering": gathering,
    "server": with_server,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny, without a line")
    args = parser.parse_args()
    if args.dry:
        step.SIDE = 112
    line = {"part": args.part, "torch": torch.__version__}
    if not args.dry:
        line["device"] = torch.cuda.get_device_name()
    try:
        line |= PARTS[args.part](Bench(args.dry))
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"[:500]
    print(json.dumps(line), flush=True)
    if not args.dry:
        with RAW.open("a") as file:
            file.write(json.dumps(line) + "\n")
    sys.exit("error" in line)


if __name__ == "__main__":
    main()

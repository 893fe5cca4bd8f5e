"""Checkpoints: written whole or not at all, found again, and resumed exactly.

A checkpoint is a folder for from_pretrained and vLLM, with a trainer.pt beside the weights:
optimizer, step, random generators, the metrics so far, and with LoRA the weights before they are
merged. checksums.json, written last, holds the SHA-256 of every file. Nothing is ever unpickled.
"""
import json
import os
import random
import shutil
from hashlib import file_digest
from pathlib import Path

import numpy
import torch
from torch.distributed.checkpoint import state_dict as sharded
from tqdm import tqdm

from policy import FULL, merge_adapters
from support.ranks import join_ranks, on_lead


def save(run_dir: Path, step: int, policy, optimizer, processor, keep: int) -> None:
    """Write run_dir/checkpoint-STEP and leave the `keep` newest. Every rank must call this."""
    weights, moments = sharded.get_state_dict(policy.model, optimizer, options=FULL)
    if join_ranks()[0] > 0:
        return
    partial, target = run_dir / "unfinished", run_dir / f"checkpoint-{step}"
    for left_over in (partial, target):
        shutil.rmtree(left_over, ignore_errors=True)
    merged = merge_adapters(weights)
    policy.model.save_pretrained(partial, state_dict=merged)
    processor.save_pretrained(partial)
    has_adapters = merged.keys() != weights.keys()
    state = {"step": step, "optimizer": moments, "unmerged": weights if has_adapters else None,
             "metrics": (run_dir / "metrics.jsonl").read_text(), **random_state()}
    torch.save(state, partial / "trainer.pt")
    (partial / "checksums.json").write_text(json.dumps(checksums(partial)))
    partial.rename(target)
    os.sync()  # all of it is on disk before the oldest ones go
    for path in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(path)


def find(resume: bool | str, run_dir: Path) -> Path | None:
    """The checkpoint that `resume` of the config asks for; rank 0 looks. None: begin anew."""
    if isinstance(resume, str):
        if not on_lead(lambda: is_whole(Path(resume))):
            raise ValueError(f"resume = {resume!r} is no whole checkpoint")
        return Path(resume)
    if resume:
        return on_lead(lambda: newest_whole(run_dir))
    return None


def newest_whole(run_dir: Path) -> Path | None:
    for path in reversed(checkpoints(run_dir)):
        if is_whole(path):
            return path
    return None


def checkpoints(run_dir: Path) -> list[Path]:
    """Those of a run, the newest last."""
    return sorted(run_dir.glob("checkpoint-*"), key=os.path.getmtime)


def load(path: Path, model, optimizer) -> tuple[int, str]:
    """Set model, optimizer and random generators back; (step, the text of metrics.jsonl).

    Every rank must call this. ValueError if the checkpoint is of another model or lora_rank.
    """
    state = torch.load(path / "trainer.pt", weights_only=True, mmap=True)
    weights = state["unmerged"]
    if weights is None:
        weights = type(model).from_pretrained(path, dtype=model.dtype).state_dict()
    try:
        sharded.set_state_dict(model, optimizer, model_state_dict=weights,
                               optim_state_dict=state["optimizer"], options=FULL)
    except RuntimeError as error:
        raise ValueError(f"{path} is of another model or lora_rank: {error!s:.300}") from error
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    tqdm.write(f"resumed from {path}")
    return state["step"], state["metrics"]


def random_state() -> dict:
    """The random generators, as tensors, numbers and tuples alone."""
    name, keys, *rest = numpy.random.get_state()
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all(),
            "python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}


def checksums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of a checkpoint, but for the list of these itself."""
    sums = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "checksums.json":
            with path.open("rb") as file:
                sums[os.path.relpath(path, folder)] = file_digest(file, "sha256").hexdigest()
    return sums


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint is there, with the bytes that were written."""
    try:
        if json.loads((checkpoint / "checksums.json").read_text()) == checksums(checkpoint):
            return True
    except (OSError, ValueError):
        pass
    tqdm.write(f"{checkpoint} is damaged or incomplete")
    return False

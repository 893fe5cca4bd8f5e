"""Checkpoints: written whole or not at all, found again, and resumed exactly.

A checkpoint is a folder for from_pretrained and vLLM, with a trainer.pt beside the weights:
optimizer, step, random generators, the config and the metrics so far, and with LoRA the weights
before they are merged. checksums.json, written last, holds the SHA-256 of every file. Nothing is
ever unpickled.

A run folder is also the user's. Of what is in it only folders checkpoint-STEP whose trainer.pt is
of that step are ours to count and to delete, and `unfinished`, where a checkpoint is written.
"""
import json
import os
import pickle
import random
import re
import shutil
import time
from hashlib import file_digest
from pathlib import Path

import numpy
import torch
from torch.distributed.checkpoint import state_dict as sharded
from tqdm import tqdm

from policy import merge_adapters
from support.finite import is_broken, refuse_broken
from support.layout import as_in_files
from support.ranks import join_ranks, on_lead

FULL = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)

def save(config, step: int, policy, optimizer, processor, keep: int | None) -> None:
    """Write run_dir/checkpoint-STEP and leave the `keep` newest (None: all). All ranks call this.

    On an error, which every rank gets, all earlier checkpoints are still there. ValueError if a
    weight is not finite.
    """
    weights, moments = sharded.get_state_dict(policy.model, optimizer, options=FULL)
    on_lead(lambda: save_on_lead(config, step, policy, weights, moments, processor, keep))


def save_on_lead(config, step: int, policy, weights: dict, moments: dict, processor,
                 keep: int | None) -> None:
    refuse_broken({name: is_broken(tensor) for name, tensor in weights.items()}, step)
    run_dir, merged = config.run_dir, merge_adapters(weights)
    partial, target = run_dir / "unfinished", run_dir / f"checkpoint-{step}"
    has_adapters = merged.keys() != weights.keys()
    write(partial, config, step, policy, merged, processor,
          {"optimizer": moments, "unmerged": weights if has_adapters else None})
    set_aside_from(run_dir, step)
    partial.rename(target)
    os.sync()  # all of it is on disk before the oldest ones go
    if keep is not None:
        for path in list(own_checkpoints(run_dir).values())[:-keep]:
            remove(path, partial)


def rehearse(config, policy, processor) -> None:
    """Write all of a checkpoint but its weights, and remove it: ValueError if that cannot be done.

    For example, transformers loads a model with an invalid generation_config.json, but does not
    save it, and a run should not learn that at its end.
    """
    partial = config.run_dir / "unfinished"
    try:
        write(partial, config, 0, policy, {}, processor, {})
    except Exception as error:  # processors and models bring code of their own
        reason = " ".join(str(error).split())
        raise ValueError(f"this run could not be saved in {config.run_dir}: {reason}") from error
    shutil.rmtree(partial)


def write(folder: Path, config, step: int, policy, weights: dict, processor, state: dict) -> None:
    """The files of a checkpoint, in a new folder; if that fails, none."""
    metrics = config.run_dir / "metrics.jsonl"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        policy.model.save_pretrained(folder, save_original_format=False,
                                     state_dict=as_in_files(policy.model, weights))
        processor.save_pretrained(folder)
        # Without the user's metrics.jsonl, which he may have removed, a run goes on all the same.
        state = {"step": step, "metrics": metrics.read_text() if metrics.exists() else "",
                 "config": json.dumps(config.to_record(), default=str), **state, **random_state()}
        try:
            torch.save(state, folder / "trainer.pt")
        except RuntimeError as error:  # whose words are of positions in the file
            raise OSError(f"{folder / 'trainer.pt'} was cut: is the disk full?") from error
        (folder / "checksums.json").write_text(json.dumps(checksums(folder)))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # a full disk needs its space
        raise


def set_aside_from(run_dir: Path, step: int) -> None:
    """Move away the checkpoints from this step on: they are of another course of the run."""
    later = [path for found, path in own_checkpoints(run_dir).items() if found >= step]
    in_the_way = run_dir / f"checkpoint-{step}"
    if os.path.lexists(in_the_way) and in_the_way not in later:
        later.append(in_the_way)  # damaged, or not of ours
    set_aside(later, run_dir)


def set_aside(paths: list[Path], run_dir: Path) -> None:
    """Move what an earlier run left in this one's place to a new folder beside the run folder."""
    if paths:
        past = Path(f"{run_dir.resolve()}-past-{time.time_ns()}")
        past.mkdir()
        for path in paths:
            shutil.move(path, past / path.name)  # a run folder may be a file system of its own
        names = ", ".join(path.name for path in paths)
        tqdm.write(f"{run_dir}: what an earlier run left there is now in {past}: {names}")


def remove(path: Path, partial: Path) -> None:
    """Delete a checkpoint; what an interruption leaves of it has the name of an unfinished one."""
    try:
        path.rename(partial)
        shutil.rmtree(partial)
    except OSError as error:
        tqdm.write(f"the old checkpoint {path} could not be removed: {error}")


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
    """The checkpoint of the highest step; None, and a line that says so, if there is none."""
    named = named_checkpoints(run_dir)
    for step in sorted(named, reverse=True):
        if is_whole(named[step]):
            if read_state(named[step])["step"] == step:
                return named[step]
            tqdm.write(f"{named[step]} is passed over: it is a copy of another step")
    tqdm.write(f"resume: there is no checkpoint in {run_dir}, the run begins anew")
    return None


def named_checkpoints(run_dir: Path) -> dict[int, Path]:
    """{step: folder} by name alone; links, archives and checkpoint-best are no checkpoints."""
    found = {}
    for path in run_dir.glob("checkpoint-*"):
        name = re.fullmatch("checkpoint-(0|[1-9][0-9]*)", path.name)
        if name and path.is_dir() and not path.is_symlink():
            found[int(name[1])] = path
    return found


def own_checkpoints(run_dir: Path) -> dict[int, Path]:
    """{step: folder} of those that this trainer wrote under these names, the newest last."""
    named = named_checkpoints(run_dir)
    return {step: named[step] for step in sorted(named) if step_of(named[step]) == step}


def step_of(checkpoint: Path) -> int | None:
    """The step that its trainer.pt is of; None if there is none that can be read."""
    try:
        return read_state(checkpoint)["step"]
    except (OSError, RuntimeError, LookupError, TypeError, EOFError, pickle.UnpicklingError):
        return None


def read_state(checkpoint: Path) -> dict:
    """What trainer.pt holds; its tensors stay on disk until they are used."""
    return torch.load(checkpoint / "trainer.pt", weights_only=True, mmap=True)


def load(path: Path, model, optimizer, config) -> tuple[int, str]:
    """Set model, optimizer and random generators back; (step, the text of metrics.jsonl).

    The keys of the config have their new values, the optimizer's too; a line says which are new.
    Every rank must call this, and gets its slices of what rank 0 reads. ValueError if the
    checkpoint is of another model or lora_rank.
    """
    state = read_state(path)
    changes = ", ".join(config_changes(json.loads(state.get("config", "{}")), config))
    weights = {}
    on_lead(lambda: weights.update(read_weights(path, state, model, changes)))
    rank, world = join_ranks()
    options = sharded.StateDictOptions(full_state_dict=True, broadcast_from_rank0=world > 1)
    # One by one: set_state_dict() takes what is empty, as it is on the other ranks, for not meant.
    sharded.set_model_state_dict(model, weights, options=options)
    sharded.set_optimizer_state_dict(
        model, optimizer, state["optimizer"] if rank == 0 else {}, options=options)
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"][:torch.cuda.device_count()])
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
        group["weight_decay"] = config.weight_decay
    tqdm.write(f"resumed from {path}, step {state['step']} of {config.max_steps}")
    if changes:
        tqdm.write(f"resumed with other values than it had until then: {changes}")
    return state["step"], state["metrics"]


def read_weights(path: Path, state: dict, model, changes: str) -> dict:
    """The weights of a checkpoint by the model's own names; ValueError if it has other ones."""
    weights, trained = state["unmerged"], [p for p in model.parameters() if p.requires_grad]
    if weights is None:
        weights = type(model).from_pretrained(path, dtype=trained[0].dtype).state_dict()
    found = {name: tensor.shape for name, tensor in weights.items()}
    others = found.items() ^ {name: p.shape for name, p in model.state_dict().items()}.items()
    names = {name for name, _ in others}
    [group] = state["optimizer"]["param_groups"]
    names |= {name for name, p in model.named_parameters() if p.requires_grad} ^ {*group["params"]}
    if names:
        raise ValueError(f"{path} is of another model or lora_rank, or other weights of it were "
                         f"trained ({changes}): {', '.join(sorted(names)[:3])}")
    return weights


def config_changes(old: dict, config) -> list[str]:
    """"key: old value -> new value" of each key of the config that another value is given to."""
    new = json.loads(json.dumps(config.to_record(), default=str))
    if old:  # a key that is younger than the checkpoint had its default value
        old = type(config)().to_record() | old
    return [f"{key}: {json.dumps(old[key])} -> {json.dumps(new[key])}" for key in new
            if key != "resume" and key in old and old[key] != new[key]]


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
    """Whether every file of the checkpoint is there, with the bytes that were written.

    A file that was added to it, such as a note or a file manager's, does no harm.
    """
    try:
        written = json.loads((checkpoint / "checksums.json").read_text())
        lists_files = isinstance(written, dict) and "trainer.pt" in written
        if lists_files and written.items() <= checksums(checkpoint).items():
            return True
    except (OSError, ValueError):
        pass
    tqdm.write(f"{checkpoint} is damaged or incomplete")
    return False

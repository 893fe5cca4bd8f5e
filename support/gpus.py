"""Which GPUs a process may use: indices are positions in the user's CUDA_VISIBLE_DEVICES.

The server gets the first entries of that list, and the trainer's ranks the ones after them, one
each. Entries may be numbers, names (GPU-...) or MIG instances (MIG-...).
"""
import os

import torch

USERS_LISTS = {}  # what this process has set in the place of the user's list -> that list


def users_gpus() -> list[str] | None:
    """The entries of the user's list, or None without one: then all GPUs, by number."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    return [entry.strip() for entry in USERS_LISTS.get(text, text).split(",")]


def entries_at(first: int, count: int) -> list[str]:
    """`count` entries of the user's list from position `first` on; ValueError if it is shorter."""
    gpus = users_gpus()
    if gpus is None:
        return [str(position) for position in range(first, first + count)]
    if first + count > len(gpus):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={','.join(gpus)} shows {len(gpus)} of the "
                         f"{first + count} GPUs that inference.gpus and trainer.gpus ask for")
    return gpus[first:first + count]


def use_gpu(position: int) -> None:
    """Make the GPU at this position of the user's list the one of this process, if it has CUDA.

    CUDA shows a process one MIG instance alone, the first of its list, and reads that list at its
    first call: so the list is cut to the instance before anything here asks for CUDA.
    """
    gpus, device = users_gpus() or [], position
    if position < len(gpus) and gpus[position].startswith("MIG-"):
        USERS_LISTS[gpus[position]] = ",".join(gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[position]
        device = 0
    if torch.cuda.is_available():
        entries_at(position, 1)
        torch.cuda.set_device(device)

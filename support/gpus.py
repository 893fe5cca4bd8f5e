"""Which GPUs a process may use: indices are positions in the user's CUDA_VISIBLE_DEVICES.

The server gets the first entries of that list, and the trainer's ranks the ones after them, one
each. Entries may be numbers, names (GPU-...) or MIG instances (MIG-...).

torch is imported where it is needed: a server starts before that import, which takes seconds.
"""
import os
import re
import sys
from importlib.metadata import version

USERS_LISTS = {}  # what this process has set in the place of the user's list -> that list


def has_gpu() -> bool:
    """Whether torch sees a GPU. Before its import a wheel for CPUs alone says so by its version."""
    if "torch" not in sys.modules and version("torch").endswith("+cpu"):
        return False
    import torch
    return torch.cuda.is_available()


def users_gpus() -> list[str]:
    """The entries of the user's list up to the first that names no GPU, where CUDA stops, too.

    Without a list these are the numbers of all GPUs.
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        import torch
        return [str(number) for number in range(torch.cuda.device_count())]
    gpus = []
    for entry in USERS_LISTS.get(text, text).split(","):
        if not re.fullmatch(r"\d+|(GPU|MIG)-.+", entry.strip()):
            break
        gpus.append(entry.strip())
    return gpus


def entries_at(first: int, count: int) -> list[str]:
    """`count` entries of the user's list from position `first` on; ValueError if it is shorter."""
    gpus = users_gpus()
    if first + count > len(gpus):
        raise ValueError(f"inference.gpus and trainer.gpus ask for {first + count} GPUs, but "
                         f"CUDA_VISIBLE_DEVICES or this machine has {len(gpus)}: {','.join(gpus)}")
    return gpus[first:first + count]


def use_gpu(position: int) -> None:
    """Make the GPU at this position of the user's list the one of this process, if it has CUDA.

    CUDA shows a process one MIG instance alone, the first of its list, and reads that list at its
    first call. So the list is cut to the instance before anything here asks for CUDA.
    """
    gpus, device = users_gpus(), position
    if position < len(gpus) and gpus[position].startswith("MIG-"):
        USERS_LISTS[gpus[position]] = ",".join(gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[position]
        device = 0
    if has_gpu():
        import torch
        [name] = entries_at(position, 1)
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            raise ValueError(f"the GPU {name} cannot be used: {error}") from error

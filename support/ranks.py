"""Several trainer processes: who they are, what rank 0 does for all, and who starts them.

Every function is for one process, too, which is rank 0 of 1.
"""
import os
import sys
from datetime import timedelta

import torch
from torch import Tensor, distributed


def become_torchrun(processes: int) -> None:
    """Turn this process into torchrun, which runs the same command in so many processes."""
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              f"--nproc-per-node={processes}", *sys.argv])


def join_ranks() -> tuple[int, int]:
    """(rank, number of ranks) of this process, grouped with the others if torchrun made it."""
    if "RANK" in os.environ and not distributed.is_initialized():
        distributed.init_process_group(timeout=timedelta(hours=2))  # rank 0 may restart a server
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # vLLM's groups have a store each
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def on_lead(action, helper=None):
    """action() on rank 0; every rank gets its result, or its exception.

    The exception then has the attribute on_all_ranks: all of them go on from the same place. In the
    meantime the other ranks call the methods of `helper` that rank 0 asks them to: see call_on_all.
    """
    rank, world = join_ranks()
    result = error = None
    if rank == 0:
        try:
            result = action()
        except Exception as raised:
            error = raised
            error.on_all_ranks = True
        if world > 1:
            distributed.broadcast_object_list(["end", (result, error)])
    else:
        message = [None, None]
        while message[0] != "end":
            distributed.broadcast_object_list(message)
            if message[0] != "end":
                getattr(helper, message[0])(*message[1])
        result, error = message[1]
    if error is not None:
        raise error
    return result


def call_on_all(method: str, *arguments) -> None:
    """First line of a method that all ranks must be in at once, when rank 0 calls it in on_lead().

    There it makes the others call it, of their own helper; in them it does nothing.
    """
    rank, world = join_ranks()
    if rank == 0 and world > 1:
        distributed.broadcast_object_list([method, arguments])


def receive(tensors: list[Tensor], device) -> None:
    """Give these tensors of a model, on every rank, the values that rank 0 has, on the device.

    Those that a rank has not loaded are on the meta device until then.
    """
    for tensor in tensors:
        if tensor.is_meta:
            empty = torch.empty_like(tensor, device=device)
            if isinstance(tensor, torch.nn.Parameter):
                empty = torch.nn.Parameter(empty, tensor.requires_grad)
            torch.utils.swap_tensors(tensor, empty)  # under all names that it has
        else:
            tensor.data = tensor.data.to(device)
        distributed.broadcast(tensor.data, 0)


def is_on_all_ranks(error: Exception) -> bool:
    """Whether all ranks have it, and so go on from the same place and may make the same calls."""
    return join_ranks()[1] == 1 or getattr(error, "on_all_ranks", False)


def add_up(sums: dict[str, float], device) -> dict[str, float]:
    """The sums of all ranks, each of which has the same names in the same order."""
    if join_ranks()[1] == 1:
        return sums
    values = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return dict(zip(sums, values.tolist()))

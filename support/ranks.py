"""Several trainer processes: who they are, what rank 0 does for all, and who starts them.

Every function is for one process, too, which is rank 0 of 1.
"""
import os
import sys
from datetime import timedelta

import torch
from torch import distributed


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


def on_lead(action):
    """action() on rank 0; every rank gets its result, or its exception.

    The exception then has the attribute on_all_ranks: all of them go on from the same place.
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
        outcome = [result, error]
        distributed.broadcast_object_list(outcome)
        result, error = outcome
    if error is not None:
        raise error
    return result


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

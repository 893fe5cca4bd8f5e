"""Weights to a vLLM server on a CPU: vLLM's NCCL engines, used as they are, meet over gloo."""
from datetime import timedelta

import torch
from torch import Tensor


class Gloo:
    """A gloo group with the methods of vLLM's NCCL communicator."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, device=None):
        from vllm.distributed.utils import stateless_init_torch_distributed_process_group
        self.group = stateless_init_torch_distributed_process_group(
            address, port, rank, world_size, "gloo",
            timeout=timedelta(seconds=15))  # as long a worker waits for a trainer that was killed

    def broadcast(self, tensor: Tensor, src: int, stream=None) -> None:
        self.group.broadcast(tensor, src).wait()

    def destroy(self) -> None:
        self.group = None


class NoStream:
    """In the place of a CUDA stream: what was begun has ended."""

    def synchronize(self) -> None:
        return None


def use_gloo() -> None:
    """Put gloo in the place of NCCL, in this process."""
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor
    nccl_common.stateless_init_process_group = Gloo
    packed_tensor._get_streams = lambda _, count: [NoStream()] * count
    torch.accelerator.current_device_index = no_device
    torch.cuda.current_stream = no_device


def no_device() -> None:
    return None


def repack_experts() -> None:
    """Have a server on a CPU bring new weights of experts into the layout of its kernels.

    vLLM 0.32 does that when it loads them, but after an update it takes the kernel that is there
    for a reason not to: the same weights sent again make garbage. Here no kernel is ever there.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod as Method)
    set_up = Method._setup_kernel

    def set_up_anew(self, *args, **kwargs):
        self.moe_kernel = None
        return set_up(self, *args, **kwargs)

    if set_up.__name__ != set_up_anew.__name__:  # a second trainer has met this worker
        Method._setup_kernel = set_up_anew


class GlooWorker:
    """What the workers of a server that we start learn, from --worker-extension-cls."""

    def use_gloo(self) -> None:
        use_gloo()
        repack_experts()

    def keeps_a_head(self) -> bool:
        """Whether the head is a module of its own, also one whose weight is the embedding's.

        Such a one is loaded by itself: an update without it leaves it as it was.
        """
        return any(name.rpartition(".")[2] == "lm_head"
                   for name, _ in self.model_runner.model.named_modules())

    def clean_caches(self) -> None:
        """Zero the key-value caches that hold a number that is not finite.

        Attention reads whole blocks. What lies after a request's last token is masked with a
        weight of 0, but 0 * NaN is NaN: what exploded weights left there would spoil the requests
        of every trainer to come.
        """
        for cache in self.model_runner.kv_caches:
            tensors = cache if isinstance(cache, (list, tuple)) else [cache]
            for tensor in tensors:
                low, high = tensor.aminmax()  # both are NaN if one entry is; and no copy is made
                if not (low.isfinite() and high.isfinite()):
                    tensor.zero_()

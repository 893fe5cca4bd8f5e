"""Weights that have exploded, by name."""
from torch import Tensor


def is_broken(tensor: Tensor) -> bool:
    """Whether a number of a tensor is not finite; of a sharded one, those that this rank holds."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if not tensor.numel() or not tensor.is_floating_point():
        return False
    low, high = tensor.detach().aminmax()  # both are NaN if one entry is; and no copy is made
    return not (low.isfinite() and high.isfinite())


def refuse_broken(are_broken: dict[str, bool], step: int) -> None:
    """ValueError names the weights that are not finite, if there are any."""
    names = [name for name, broken in are_broken.items() if broken]
    if names:
        raise ValueError(f"the weights after step {step} are not finite: {len(names)} of "
                         f"{len(are_broken)}, {', '.join(names[:3])}. They are neither sent nor "
                         "saved; lower learning_rate and resume from an earlier checkpoint")

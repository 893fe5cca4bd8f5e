"""Weights that have exploded, by name."""
from torch import Tensor


def check_finite(weights: dict[str, Tensor], step: int) -> None:
    """ValueError names the weights after this step that are not finite, if there are any."""
    broken = []
    for name, tensor in weights.items():
        if tensor.numel() and tensor.is_floating_point():
            low, high = tensor.aminmax()  # both are NaN if one entry is; and no copy is made
            if not (low.isfinite() and high.isfinite()):
                broken.append(name)
    if broken:
        raise ValueError(f"the weights after step {step} are not finite: {len(broken)} of "
                         f"{len(weights)}, {', '.join(broken[:3])}. They are neither sent nor "
                         "saved; lower learning_rate and resume from an earlier checkpoint")

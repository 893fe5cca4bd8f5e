"""Weights under the names, and in the layout, of the files that their model was loaded from.

vLLM loads what it is sent as it loads those files. transformers knows most of the way back to them
(revert_weight_conversion), and the headers of the files say the rest: whether a tied head is in
them, and whether experts lie there transposed.
"""
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file


def file_shapes(model) -> dict[str, tuple[int, ...]]:
    """{name: shape} in the safetensors files of the model's folder or hub id; {} without them."""
    source = model.config._name_or_path
    config = source and cached_file(source, "config.json", local_files_only=True,
                                    _raise_exceptions_for_missing_entries=False)
    shapes = {}
    for path in sorted(Path(config).parent.glob("*.safetensors")) if config else ():
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def as_in_files(model, weights: dict[str, Tensor],
                shapes: dict[str, tuple[int, ...]] | None = None,
                all_names: bool = False) -> dict[str, Tensor]:
    """The weights, by the model's own names, as its files hold them, whose shapes are these.

    A tied weight goes under the names that the files have, or under all of its names. Without files
    the weights are as transformers would save them, under all names. ValueError names a weight that
    the files do not have.
    """
    if shapes is None:
        shapes = file_shapes(model)
    found = revert_weight_conversion(model, weights)
    if not shapes:
        return found
    tied = {name: weights[name] for name in model.all_tied_weights_keys if name in weights}
    tied = revert_weight_conversion(model, tied).keys() if tied else ()
    result = {}
    for name, tensor in found.items():
        if name not in shapes and name in tied:
            if all_names:
                result[name] = tensor
            continue
        if name in shapes and tensor.shape != shapes[name] and tensor.dim() > 1:
            tensor = tensor.transpose(-2, -1)  # of each expert
        if shapes.get(name) != tensor.shape:
            raise ValueError(f"weights: {name} is {tuple(tensor.shape)} in the trainer, but in the "
                             f"files of {model.config._name_or_path} "
                             f"{shapes.get(name, 'there is none of that name')}")
        result[name] = tensor
    return result

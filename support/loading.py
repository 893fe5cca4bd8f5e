"""A checkpoint from disk or the hub -> the model, on the device of this process, and its processor."""
import os
from pathlib import Path

import huggingface_hub
import torch
import transformers

from support.gpus import has_gpu, use_gpu
from support.ranks import join_ranks


def load_model(config):
    """(model, processor) of config.model. The weights are fp32, for the sake of small updates.

    On a GPU, where some of them are frozen, they have the type of the files: see train_in_fp32.
    Of several ranks rank 0 alone reads them: those of the others are on the meta device, without
    memory, until Policy.shard() deals them out. ValueError if it is neither a folder that holds a model nor one of the Hugging Face hub, or one
    that transformers does not have itself.
    """
    use_gpu(trainer_gpu(config))
    rank, world = join_ranks()
    on_one_gpu = has_gpu() and world == 1 and not config.cpu_offload
    transformers.logging.disable_progress_bar()  # an error is one line
    try:
        check_hub(config.model)
        kind = transformers.AutoConfig.from_pretrained(config.model, trust_remote_code=False)
        takes_images = type(kind) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if takes_images:
            some_are_frozen = config.lora_rank > 0 or config.freeze_vision
            options = {"dtype": "auto" if on_one_gpu and some_are_frozen else torch.float32,
                       "attn_implementation": config.attn_implementation or None}
            make = transformers.AutoModelForImageTextToText
            if rank == 0:
                model = make.from_pretrained(config.model, trust_remote_code=False, **options)
            else:
                with torch.device("meta"):
                    model = make.from_config(kind, **options)
            processor = transformers.AutoProcessor.from_pretrained(
                config.model, trust_remote_code=False)
    except Exception as error:  # of a broken file, of the network, or of a model's own code
        raise ValueError(missing_model(config.model, error)) from error
    if not takes_images:
        raise ValueError(f"model: {config.model} is of model_type {kind.model_type!r}, for which "
                         "transformers has no model that sees images")
    if on_one_gpu:  # else FSDP moves its blocks
        model = model.cuda()
    return model, processor


def check_hub(name: str) -> None:
    """Raise at once if a model cannot be had from the hub, where transformers tries for 50 s."""
    if not Path(name).is_dir() and not huggingface_hub.try_to_load_from_cache(name, "config.json"):
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json"))


def missing_model(name: str, error: Exception) -> str:
    """What is wrong with a model that cannot be loaded; the library speaks of the hub alone."""
    if "trust_remote_code" in str(error):
        return (f"model: {name} brings code of its own, which is not run; transformers must have "
                "its model_type itself")
    if Path(name).is_dir():
        kind = type(error).__name__
        return f"model: {name} does not hold a whole model: {kind}: {error}"
    return (f"model: there is no folder {name!r} in the working directory {os.getcwd()} or beside "
            f"the config, and as a name of the Hugging Face hub it cannot be loaded: {error}")


def trainer_gpu(config) -> int:
    """The position of this process's GPU: after those of the server, unless they share one."""
    first = 0
    if config.local and config.trainer_gpus:
        first = max(1, config.inference_gpus)
    return first + int(os.environ.get("LOCAL_RANK", 0))

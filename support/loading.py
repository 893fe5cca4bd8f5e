"""A checkpoint from disk or the hub -> the model, on the device of this process, and its processor."""
import os

import torch
import transformers

from support.ranks import join_ranks


def load_model(config):
    """(model, processor) of config.model. The weights are fp32, for the sake of small updates."""
    transformers.logging.disable_progress_bar()  # an error is one line
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        config.model, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(config.model)
    if torch.cuda.is_available():
        torch.cuda.set_device(trainer_gpu(config))
        _, world = join_ranks()
        if world == 1:  # else FSDP moves its shards
            model = model.cuda()
    return model, processor


def trainer_gpu(config) -> int:
    """The GPU of this process: after those of the server, unless it shares its only one."""
    first = config.inference_gpus if config.local and config.trainer_gpus else 0
    return first + int(os.environ.get("LOCAL_RANK", 0))

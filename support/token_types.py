"""What some models must be told beside the token ids: which of the tokens are images."""
import inspect

import torch

from batch import MultimodalBatch


def with_token_types(batch: MultimodalBatch, model) -> MultimodalBatch:
    """The batch with mm_token_type_ids (B, L), if the model needs them and the adapter gave none.

    They are 1 for the tokens of images, 2 for those of videos and 0 for text, by the token ids that
    the model's config names. Without them a model with M-RoPE cannot tell where its images stand.
    """
    given = batch.extra_model_kwargs
    accepted = inspect.signature(model.base_model.forward).parameters
    if not given or "mm_token_type_ids" in given or "mm_token_type_ids" not in accepted:
        return batch
    types = torch.zeros_like(batch.input_ids)
    for number, kind in enumerate(("image", "video"), start=1):
        token_id = getattr(model.config, f"{kind}_token_id", None)
        if token_id is not None:
            types[batch.input_ids == token_id] = number
    return batch.with_fields(extra_model_kwargs={**given, "mm_token_type_ids": types})

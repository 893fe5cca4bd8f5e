"""What some models must be told beside the token ids: which of the tokens are images."""
import inspect

import torch

from batch import MultimodalBatch


def with_token_types(batch: MultimodalBatch, model, completion_type: int = 0) -> MultimodalBatch:
    """The batch with mm_token_type_ids (B, L), if the model needs them and the adapter gave none.

    They are 1 for the tokens of images, 2 for those of videos and 0 for text, by the token ids that
    the model's config names. Without them a model with M-RoPE cannot tell where its images stand.

    Token_type_ids that the processor gave are set to the completion_type from the first sampled
    token of each row on: for some families a 0 is of the prefix, all of which every token sees.
    """
    given = dict(batch.extra_model_kwargs)
    if completion_type and "token_type_ids" in given:
        after = batch.attention_mask.bool() & ~batch.before_completion()
        given["token_type_ids"] = given["token_type_ids"].masked_fill(after, completion_type)
    accepted = inspect.signature(model.base_model.forward).parameters
    if given and "mm_token_type_ids" not in given and "mm_token_type_ids" in accepted:
        types = torch.zeros_like(batch.input_ids)
        for number, kind in enumerate(("image", "video"), start=1):
            token_id = getattr(model.config, f"{kind}_token_id", None)
            if token_id is not None:
                types[batch.input_ids == token_id] = number
        given["mm_token_type_ids"] = types
    return batch.with_fields(extra_model_kwargs=given)

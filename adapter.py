"""Images and token ids -> MultimodalBatch, for any vision-language model with a processor.

The server's token ids are trained on as they are. The processor runs once per prompt for all else
(pixels, grids, token types); that its ids equal the server's proves that these fit, and is checked
for every prompt. `python adapter.py MODEL` shows whether a model can be trained (models/check.py).
"""
import sys
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from batch import MultimodalBatch
from rollout import GenerateOutputs


class MultimodalAdapter:
    """The built-in adapter, given AutoProcessor's processor; or subclass it: write build_batch."""
    processor = None

    def __init__(self, processor=None):
        self.processor = processor

    def build_batch(self, outputs: GenerateOutputs) -> MultimodalBatch:
        """One (B, L) row per completion; ValueError if the server read a prompt otherwise."""
        given = getattr(outputs, "encoded", [None] * len(outputs))
        prompts, encoded, index, rows = {}, [], [], []  # prompts: token ids and image objects
        for i, (p, c, logprobs, images) in enumerate(zip(
                outputs.prompt_ids, outputs.completion_ids, outputs.completion_logprobs,
                outputs.images, strict=True)):
            index.append(prompts.setdefault((tuple(p), *map(id, images)), len(prompts)))
            if len(encoded) < len(prompts):
                encoded.append(given[i] or self.encode(outputs.prompt[i], images))
                self.check(encoded[-1]["input_ids"][0].tolist(), p, outputs.example_id[i])
            if len(c) != len(logprobs):
                raise ValueError("the server must return a logprob for each token it sampled")
            rows.append((p + c, [1] * len(p + c), [0] * len(p) + [1] * len(c),
                         [0.0] * len(p) + logprobs))
        tokens = [pad_sequence([*map(torch.tensor, column)], True) for column in zip(*rows)]
        inputs, image_rows = collate(encoded, index, tokens[0].shape[1])
        return MultimodalBatch(
            *tokens, torch.tensor(outputs.reward, dtype=torch.float32),
            inputs.pop("pixel_values", None), inputs, torch.tensor(index), image_rows)

    def encode(self, prompt: list[dict], images: list) -> dict[str, Tensor]:
        """All that the processor makes of one prompt with these PIL images."""
        if self.processor is None:
            raise ValueError("MultimodalAdapter() has no processor; pass one or write build_batch")
        messages = [m if isinstance(m["content"], str) else {**m, "content": [
            {"type": "image"} if part["type"] in ("image", "image_url") else part
            for part in m["content"]]} for m in prompt]
        text = self.processor.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=True)
        # the flat list and add_special_tokens matter: else some add a BOS or misread images
        found = self.processor(text=[text], images=images or None, add_special_tokens=False,
                               return_tensors="pt")
        return {key: tensor.float() if tensor.is_floating_point() else tensor  # one is bfloat16
                for key, tensor in found.items() if tensor is not None}

    def check(self, ours: list[int], served: list[int], example_id: int) -> None:
        """Raises ValueError showing where the processor's prompt and the server's part."""
        if ours != served:
            at = next(i for i, (a, b) in enumerate(zip_longest(ours, served)) if a != b)
            near = [ids[max(0, at - 5):at + 5] for ids in (ours, served)]
            raise ValueError(
                f"example {example_id}: from token {at} on, processor ({len(ours)} tokens) and "
                f"server ({len(served)}) differ, {near} = "
                f"{[*map(self.processor.tokenizer.decode, near)]}, by other pixel limits on the "
                "server (mm_processor_kwargs), another chat template, tokenizer, or truncation")


def collate(encoded: list[dict], index: list[int], width: int) -> tuple[dict, dict]:
    """The processor's tensors of all prompts -> (extra_model_kwargs, image_rows).

    Token-level ones, (1, prompt length), become (B, width) with 0 over completions; all others are
    concatenated along dim 0, their other dims zero-padded to the largest.
    """
    inputs, image_rows = {}, {}
    for key in sorted({key for e in encoded for key in e} - {"input_ids", "attention_mask"}):
        if all(e[key].shape == e["input_ids"].shape for e in encoded if key in e):
            lines = [e.get(key, torch.zeros_like(e["input_ids"])) for e in encoded]
            inputs[key] = torch.cat([pad(p, (0, width - p.shape[1])) for p in lines])[index]
        else:
            pieces = [e[key] for e in encoded if key in e]
            sizes = [max(dims) for dims in zip(*(p.shape[:0:-1] for p in pieces), strict=True)]
            inputs[key] = torch.cat([pad(p, [n for size, have in zip(sizes, p.shape[:0:-1])
                                             for n in (0, size - have)]) for p in pieces])
            image_rows[key] = [len(e.get(key, ())) for e in encoded]
    return inputs, image_rows


if __name__ == "__main__":
    from models.check import main
    sys.exit(main(sys.argv[1:]))

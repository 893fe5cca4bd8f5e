"""Images and token ids -> MultimodalBatch, for any vision-language model with a processor.

The server's token ids are trained on as they are. The processor runs once per prompt for all else
(pixels, grids, token types); that its ids equal the server's proves that these fit, and is checked
for every prompt. `python adapter.py MODEL` shows whether a model can be trained (models/check.py).
"""
import sys

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
        prompts, encoded, index = {}, [], []  # distinct prompts, by token ids and image objects
        for i, (ids, images) in enumerate(zip(outputs.prompt_ids, outputs.images, strict=True)):
            index.append(prompts.setdefault((tuple(ids), *map(id, images)), len(prompts)))
            if len(encoded) < len(prompts):
                encoded.append(given[i] or self.encode(outputs.prompt[i], images))
                self.check(encoded[-1]["input_ids"][0].tolist(), ids, outputs.example_id[i])
        rows = [(p + c, [1] * len(p + c), [0] * len(p) + [1] * len(c), [0.0] * len(p) + logprobs)
                for p, c, logprobs in zip(outputs.prompt_ids, outputs.completion_ids,
                                          outputs.completion_logprobs, strict=True)]
        if any(len(ids) != len(logprobs) for ids, *_, logprobs in rows):
            raise ValueError("the server must return one logprob for each token of a completion")
        tokens = [pad_sequence([*map(torch.tensor, column)], True) for column in zip(*rows)]
        kwargs, image_rows = collate(encoded, index, width=tokens[0].shape[1])
        return MultimodalBatch(
            *tokens, rewards=torch.tensor(outputs.reward, dtype=torch.float32),
            pixel_values=kwargs.pop("pixel_values", None), extra_model_kwargs=kwargs,
            prompt_index=torch.tensor(index), image_rows=image_rows)

    def encode(self, prompt: list[dict], images: list) -> dict[str, Tensor]:
        """All that the processor makes of one prompt with these PIL images.

        The flat list and add_special_tokens=False matter: else some add a BOS or misread images.
        """
        if self.processor is None:
            raise ValueError("MultimodalAdapter() has no processor; pass one or write build_batch")
        messages = [{**m, "content": m["content"] if isinstance(m["content"], str) else [
            {"type": "image"} if part["type"] in ("image", "image_url") else part
            for part in m["content"]]} for m in prompt]
        text = self.processor.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=True)
        return dict(self.processor(text=[text], add_special_tokens=False, return_tensors="pt",
                                   **({"images": images} if images else {})))

    def check(self, ours: list[int], served: list[int], example_id: int) -> None:
        """Raises ValueError showing where the processor's prompt and the server's part."""
        if ours != served:
            parts = [i for i, (a, b) in enumerate(zip(ours, served)) if a != b]
            at = min([*parts, len(ours), len(served)])
            show = " and ".join(f"{name} ({len(ids)} tokens) {ids[max(0, at - 5):at + 5]} = "
                                f"{self.processor.tokenizer.decode(ids[max(0, at - 5):at + 5])!r}"
                                for name, ids in (("processor", ours), ("server", served)))
            raise ValueError(f"example {example_id}: from token {at} on, {show} differ, by other "
                             "pixel limits on the server (mm_processor_kwargs), another chat "
                             "template or tokenizer, or a prompt that the server truncated")


def collate(encoded: list[dict], index: list[int], width: int) -> tuple[dict, dict]:
    """The processor's tensors of all prompts -> (extra_model_kwargs, image_rows).

    Token-level ones, (1, prompt length), become (B, width) with 0 over completions; all others are
    concatenated along dim 0, their other dims zero-padded to the largest.
    """
    kwargs, image_rows = {}, {}
    for key in sorted({key for e in encoded for key in e} - {"input_ids", "attention_mask"}):
        pieces = [e.get(key) for e in encoded]
        present = [p for p in pieces if p is not None]
        if all(p is None or p.shape == e["input_ids"].shape for p, e in zip(pieces, encoded)):
            none = present[0].new_zeros(1, width)
            lines = [none if p is None else pad(p, (0, width - p.shape[1])) for p in pieces]
            kwargs[key] = torch.cat(lines)[index]
            continue
        sizes = [max(s) for s in zip(*(p.shape[:0:-1] for p in present), strict=True)]
        kwargs[key] = torch.cat([pad(p, [n for size, have in zip(sizes, p.shape[:0:-1])
                                         for n in (0, size - have)]) for p in present])
        if kwargs[key].is_floating_point():
            kwargs[key] = kwargs[key].float()  # one family's processor emits bfloat16
        image_rows[key] = [0 if p is None else len(p) for p in pieces]
    return kwargs, image_rows


if __name__ == "__main__":
    from models.check import main
    sys.exit(main(sys.argv[1:]))

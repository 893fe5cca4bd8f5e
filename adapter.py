"""Images and token ids -> MultimodalBatch, for any vision-language model with a processor.

The server's token ids are trained on as they are. The processor runs once per prompt for all else
(pixels, grids, token types); its ids must equal the server's, which proves that these fit.
`python adapter.py MODEL` shows whether a model can be trained (models/check.py).
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
        seen = {}  # (token ids, image objects) of a prompt -> its first row
        prompts = enumerate(zip(outputs.prompt_ids, outputs.images, strict=True))
        first = [seen.setdefault((tuple(p), *map(id, images)), i) for i, (p, images) in prompts]
        first, index = torch.tensor(first).unique(return_inverse=True)
        encoded = [self.encode_row(outputs, row) for row in first.tolist()]
        sampled = getattr(outputs, "completion_mask", [None] * len(outputs))
        turns = getattr(outputs, "turns", [()] * len(outputs))
        rows = [(p + c, [1] * len(p + c), [0] * len(p) + (m or [1] * len(c)),
                 [0.0] * len(p) + logprobs)
                for p, c, m, logprobs in zip(outputs.prompt_ids, outputs.completion_ids, sampled,
                                             outputs.completion_logprobs, strict=True)]
        if any(len(ids) != len(logprobs) for ids, *_, logprobs in rows):
            raise ValueError("the server must return one logprob for each token of a completion")
        tokens = [pad_sequence([*map(torch.tensor, column)], True) for column in zip(*rows)]
        later, own = [], [[] for _ in turns]
        for row, (p, replies) in enumerate(zip(outputs.prompt_ids, turns)):
            for at, reply in replies:
                own[row].append(len(encoded) + len(later))
                later.append((row, len(p) + at, reply))
        inputs, image_rows = collate(encoded, index, tokens[0].shape[1], later)
        return MultimodalBatch(*tokens, torch.tensor(outputs.reward, dtype=torch.float32),
                               inputs.pop("pixel_values", None), inputs, index, image_rows, own)

    def template(self, prompt: list[dict], history: list[dict] = ()) -> str:
        """A prompt's text, a placeholder for each image; after a history, what follows its end."""
        if history:  # which ends with an answer: templates put more than the new messages there
            mark = "\u2063answer\u2063"
            return self.template([*history[:-1], {**history[-1], "content": mark},
                                  *prompt]).rpartition(mark)[2]
        messages = [m if isinstance(m["content"], str) else {**m, "content": [
            {"type": "image"} if part["type"] in ("image", "image_url") else part
            for part in m["content"]]} for m in prompt]
        return self.processor.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=True)

    def tokens(self, prompt: list[dict], history: list[dict] = ()) -> list[int]:
        """Of template; the server puts each image's tokens where its placeholder is."""
        return self.processor.tokenizer(self.template(prompt, history),
                                        add_special_tokens=False)["input_ids"]

    def encode(self, prompt: list[dict], images: list, history=()) -> dict[str, Tensor]:
        """All that the processor makes of one prompt, or later turn, with these PIL images."""
        if self.processor is None:
            raise ValueError("MultimodalAdapter() has no processor; pass one or write build_batch")
        text = self.template(prompt, history)
        # the flat list and add_special_tokens matter: else some add a BOS or misread images
        found = self.processor(text=[text], images=images or None, add_special_tokens=False,
                               return_tensors="pt")
        return {key: tensor.float() if tensor.is_floating_point() else tensor  # one is bfloat16
                for key, tensor in found.items() if tensor is not None}

    def encode_row(self, outputs: GenerateOutputs, row: int) -> dict[str, Tensor]:
        """Its prompt encoded; ValueError shows where the processor and the server part."""
        prompt, images = outputs.prompt[row], outputs.images[row]
        encoded = getattr(outputs, "encoded", {row: None})[row] or self.encode(prompt, images)
        ours, served = encoded["input_ids"][0].tolist(), outputs.prompt_ids[row]
        if ours != served:
            at = next(i for i, (a, b) in enumerate(zip_longest(ours, served)) if a != b)
            near = [ids[max(0, at - 5):at + 5] for ids in (ours, served)]
            raise ValueError(
                f"example {outputs.example_id[row]}: from token {at} on, processor and server "
                f"({len(ours)} and {len(served)} tokens) differ, {near} = "
                f"{[*map(self.processor.tokenizer.decode, near)]}, by other pixel limits on the "
                "server (mm_processor_kwargs), another chat template, tokenizer, or truncation")
        return encoded


def collate(encoded: list[dict], index: Tensor, width: int, later=()) -> tuple[dict, dict]:
    """The processor's tensors of all prompts -> (extra_model_kwargs, image_rows).

    Token-level ones, (1, prompt length), become (B, width) with 0 over completions; all others are
    concatenated along dim 0, their other dims zero-padded to the largest. Of each of the later
    (row, start, encoded) tokens go into their row, and images behind those of the prompts.
    """
    inputs, image_rows = {}, {}
    every = encoded + [e for *_, e in later]
    for key in sorted({key for e in every for key in e} - {"input_ids", "attention_mask"}):
        if all(e[key].shape == e["input_ids"].shape for e in every if key in e):
            lines = [e.get(key, torch.zeros_like(e["input_ids"])) for e in encoded]
            inputs[key] = torch.cat([pad(p, (0, width - p.shape[1])) for p in lines])[index]
            for row, start, e in later:
                if key in e:
                    inputs[key][row, start:start + e[key].shape[1]] = e[key][0]
        else:
            pieces = [e[key] for e in every if key in e]
            sizes = [max(dims) for dims in zip(*(p.shape[:0:-1] for p in pieces), strict=True)]
            inputs[key] = torch.cat([pad(p, [n for size, have in zip(sizes, p.shape[:0:-1])
                                             for n in (0, size - have)]) for p in pieces])
            image_rows[key] = [len(e.get(key, ())) for e in every]
    return inputs, image_rows


if __name__ == "__main__":
    from models.check import main
    sys.exit(main(sys.argv[1:]))

"""Images and token ids -> MultimodalBatch, for any vision-language model with a processor.

The server's token ids are trained on as they are. The processor of the model is run once per
prompt for everything beside the ids (pixels, grids, token types); that its own ids equal the
server's is the proof that these tensors fit the prompt, and it is checked for every prompt.
`python adapter.py MODEL` runs that check, and a comparison of logprobs, against a real server.
"""
import torch
from torch import Tensor

from batch import PAD, MultimodalBatch
from rollout import GenerateOutputs

USUAL_CAUSES = ("usual causes: the server uses other pixel limits (mm_processor_kwargs), another "
                "chat template or tokenizer than the trainer, or it truncated the prompt")


class MultimodalAdapter:
    """The built-in adapter; subclass it and write build_batch for a model that it does not fit.

    processor: what AutoProcessor.from_pretrained(model) gives. A subclass with its own
    build_batch needs none.
    """

    def __init__(self, processor=None):
        self.processor = processor

    def build_batch(self, outputs: GenerateOutputs) -> MultimodalBatch:
        """One (B, L) row per completion, in the order of outputs; images once per prompt.

        Raises ValueError if the processor and the server disagree about a prompt.
        """
        prompt_rows: dict[tuple, int] = {}  # distinct prompts, by ids and image objects
        encoded, index = [], []
        for i, (prompt_ids, images) in enumerate(
                zip(outputs.prompt_ids, outputs.images, strict=True)):
            key = (tuple(prompt_ids), *map(id, images))
            if key not in prompt_rows:
                prompt_rows[key] = len(encoded)
                given = outputs.encoded[i] if outputs.encoded else None
                given = given or self.encode(outputs.prompt[i], images)
                encoded.append(self._checked(given, prompt_ids, outputs.example_id[i]))
            index.append(prompt_rows[key])
        rows = [p + c for p, c in zip(outputs.prompt_ids, outputs.completion_ids, strict=True)]
        width = max(map(len, rows))

        def padded(lists, dtype, fill=0) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in lists], dtype=dtype)

        prompt_zeros = [[0] * len(p) for p in outputs.prompt_ids]
        logprobs = [zeros + lp for zeros, lp in
                    zip(prompt_zeros, outputs.completion_logprobs, strict=True)]
        for row, ids, text in zip(logprobs, rows, outputs.completion, strict=True):
            if len(row) != len(ids):
                raise ValueError(f"completion {text[:60]!r}: {len(ids)} token ids in the row, but "
                                 f"{len(row)} logprobs; the server must return one per token")
        loss_mask = [zeros + [1] * len(c) for zeros, c in
                     zip(prompt_zeros, outputs.completion_ids, strict=True)]
        tokens, images, image_rows = collate(encoded, outputs.prompt_ids, index, width)
        return MultimodalBatch(
            input_ids=padded(rows, torch.long, PAD), loss_mask=padded(loss_mask, torch.long),
            attention_mask=padded([[1] * len(row) for row in rows], torch.long),
            behavior_logprobs=padded(logprobs, torch.float32),
            rewards=torch.tensor(outputs.reward, dtype=torch.float32),
            pixel_values=images.pop("pixel_values", None),
            extra_model_kwargs={**tokens, **images},
            prompt_index=torch.tensor(index), image_rows=image_rows)

    def encode(self, prompt: list[dict], images: list) -> dict[str, Tensor]:
        """What the processor makes of one prompt: its ids, pixels and whatever else it returns.

        images: the prompt's PIL images in order. The flat list and add_special_tokens=False
        matter: some processors misread nested lists or add a second BOS.
        """
        if self.processor is None:
            raise ValueError("MultimodalAdapter() has no processor: pass one, or write build_batch")
        messages = [{**m, "content": m["content"] if isinstance(m["content"], str) else [
            {"type": "image"} if part["type"] in ("image", "image_url") else part
            for part in m["content"]]} for m in prompt]
        text = self.processor.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=True)
        inputs = {"images": images} if images else {}
        return dict(self.processor(text=[text], **inputs, add_special_tokens=False,
                                   return_tensors="pt"))

    def _checked(self, encoded: dict, prompt_ids: list[int], example_id: int) -> dict:
        """encoded, if its ids are the server's."""
        ours = encoded["input_ids"][0].tolist()
        if ours != prompt_ids:
            at = next((i for i, (a, b) in enumerate(zip(ours, prompt_ids)) if a != b),
                      min(len(ours), len(prompt_ids)))
            window = slice(max(0, at - 5), at + 5)
            decode = self.processor.tokenizer.decode
            raise ValueError(
                f"example {example_id}: processor and server disagree about the prompt from token "
                f"{at} on: processor ({len(ours)} tokens) ...{ours[window]} "
                f"{decode(ours[window])!r}, server ({len(prompt_ids)} tokens) "
                f"...{prompt_ids[window]} {decode(prompt_ids[window])!r}; {USUAL_CAUSES}")
        return encoded


def collate(encoded: list[dict], prompt_ids: list[list[int]], index: list[int],
            width: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[int]]]:
    """The processor's tensors of all prompts -> (token-level, image tensors, image_rows).

    Token-level entries (1, prompt length) are repeated per completion and extended with 0. All
    others are concatenated along dim 0, their other dims zero-padded to the largest.
    """
    tokens: dict[str, Tensor] = {}
    images: dict[str, Tensor] = {}
    image_rows: dict[str, list[int]] = {}
    keys = {key: value for e in encoded for key, value in e.items()
            if key not in ("input_ids", "attention_mask")}
    for key, example in keys.items():
        pieces = [e.get(key) for e in encoded]
        if all(p is None or p.shape == e["input_ids"].shape for p, e in zip(pieces, encoded)):
            tokens[key] = torch.zeros(len(index), width, dtype=example.dtype)
            for row, p in enumerate(index):
                if pieces[p] is not None:
                    tokens[key][row, :len(prompt_ids[row])] = pieces[p][0]
            continue
        present = [p for p in pieces if p is not None]
        sizes = [max(s) for s in zip(*(p.shape[1:] for p in present), strict=True)]
        padding = [[n for size, have in zip(sizes[::-1], p.shape[:0:-1]) for n in (0, size - have)]
                   for p in present]
        images[key] = torch.cat([torch.nn.functional.pad(p, n) for p, n in zip(present, padding)])
        if images[key].is_floating_point():
            images[key] = images[key].float()  # one family's processor emits bfloat16
        image_rows[key] = [0 if p is None else len(p) for p in pieces]
    return tokens, images, image_rows

"""Images and token ids -> MultimodalBatch, for any vision-language model with a processor.

The server's token ids are trained on as they are. The processor runs once per prompt for all else:
pixels, grids, token types. Its ids must equal the server's: then its pixels fit them, too.
`python -m support.check MODEL` shows whether a model can be trained.
"""
import importlib
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from batch import MultimodalBatch
from rollout import GenerateOutputs
from support.prompts import (clean_prompt, processor_options, reserved_strings, server_template,
                             template_options)


class MultimodalAdapter:
    """The built-in adapter, given AutoProcessor's processor; or subclass it: write build_batch.

    A subclass is used from the command line by `[trainer] adapter = "module:Class"`. It is then
    made with processor and tokenizer, which stay as they are in attributes of these names.
    """
    processor = None
    tokenizer = None
    server_args = {}  # the server's flags; the trainer sets those of its config
    tools = ()        # of the environment, which prompts show; a generator sets them

    def __init__(self, processor=None, tokenizer=None):
        self.processor = processor
        self.tokenizer = tokenizer or getattr(processor, "tokenizer", None)

    def reserved(self) -> list[str]:
        """The strings that this adapter's processor takes for images."""
        return reserved_strings(self.tokenizer, processor=self.processor)

    def build_batch(self, outputs: GenerateOutputs) -> MultimodalBatch:
        """One (B, L) row per conversation; ValueError if the server read a prompt otherwise.

        A row is [prompt | completion | reply | completion | ...]; the loss mask is 1 on what the
        policy sampled, and 0 on the replies of the environment.
        """
        first_rows, prompt_index = self.find_prompts(outputs)
        encoded = []  # by segment: the prompts, then the replies
        for row in first_rows:
            inputs = outputs.encoded[row] if outputs.encoded else None
            if inputs is None:
                inputs = self.as_served(self.encode(outputs.prompt[row], outputs.images[row]),
                                        outputs.prompt_ids[row])
            encoded.append(inputs)
        columns = {"input_ids": [], "attention_mask": [], "loss_mask": [], "behavior_logprobs": []}
        replies, places = [], []  # of each row its segments; of each reply (row, first column)
        for row, prompt in enumerate(outputs.prompt_ids):
            completion, logprobs = outputs.completion_ids[row], outputs.completion_logprobs[row]
            if len(completion) != len(logprobs):
                raise ValueError("the server must return one logprob for each sampled token, not "
                                 f"{len(logprobs)} for {len(completion)}")
            ids = torch.tensor(prompt + completion)
            sampled = [0] * len(prompt) + outputs.completion_mask[row]
            columns["input_ids"].append(ids)
            columns["attention_mask"].append(torch.ones_like(ids))
            columns["loss_mask"].append(torch.tensor(sampled))
            columns["behavior_logprobs"].append(torch.tensor([0.0] * len(prompt) + logprobs))
            replies.append([])
            for reply in outputs.replies[row]:
                replies[row].append(len(encoded))
                encoded.append(reply.encoded)
                places.append((row, len(prompt) + reply.start))
        tokens = {name: pad_sequence(rows, batch_first=True) for name, rows in columns.items()}
        length = tokens["input_ids"].shape[1]
        inputs, image_rows = collate(encoded, torch.tensor(prompt_index), places, length)
        return MultimodalBatch(
            **tokens, rewards=torch.tensor(outputs.reward, dtype=torch.float32),
            pixel_values=inputs.pop("pixel_values", None), extra_model_kwargs=inputs,
            prompt_index=torch.tensor(prompt_index), image_rows=image_rows, replies=replies)

    def find_prompts(self, outputs: GenerateOutputs) -> tuple[list[int], list[int]]:
        """The first row of each distinct prompt, and for each row the number of its prompt.

        Prompts are the same if they have the same token ids and the same image objects.
        """
        numbers, first_rows, prompt_index = {}, [], []
        for row, ids in enumerate(outputs.prompt_ids):
            images = tuple(id(image) for image in outputs.images[row])
            prompt = (tuple(ids), images)
            if prompt not in numbers:
                numbers[prompt] = len(numbers)
                first_rows.append(row)
            prompt_index.append(numbers[prompt])
        return first_rows, prompt_index

    def render(self, messages: list[dict], history: list[dict] = ()) -> str:
        """The text of a prompt, with a placeholder for each image.

        After a history, which ends with a completion, it is what the chat template puts between
        that completion and the next one. The history itself is never rendered again as tokens:
        what was sampled would come back changed.
        """
        if history:
            mark = "\u2063completion\u2063"
            marked = [*history[:-1], {**history[-1], "content": mark}]
            return self.render([*marked, *messages]).rpartition(mark)[2]
        plain = [{**message, "content": placeholders(message["content"])} for message in messages]
        # Of the template's two places vLLM, too, takes the tokenizer's where the first has none.
        template = server_template(self.server_args)
        if not (template or self.processor.chat_template):
            template = self.tokenizer.get_chat_template()
        return self.processor.apply_chat_template(
            plain, chat_template=template, tokenize=False, add_generation_prompt=True,
            tools=list(self.tools) or None,
            **template_options(self.server_args))

    def token_ids(self, text: str) -> list[int]:
        """Those of what render() gave, an image being one placeholder, as the server wants them."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, messages: list[dict], images: list,
               history: list[dict] = ()) -> dict[str, Tensor]:
        """All that the processor makes of a prompt, or of a reply, with these PIL images."""
        if self.processor is None:
            raise ValueError("MultimodalAdapter() has no processor; pass one or write build_batch")
        messages = clean_prompt(messages, images, self.reserved())
        return self.encode_text(self.render(messages, history), images)

    def encode_text(self, text: str, images: list) -> dict[str, Tensor]:
        """The same of what render() gave."""
        check_places(text, self.reserved(), len(images))
        # With a nested list of images, or special tokens added, some families misread the images
        # or begin with a token that the server does not have.
        encoded = self.processor(text=[text], images=images or None, add_special_tokens=False,
                                 return_tensors="pt", **processor_options(self.server_args))
        tensors = {key: tensor for key, tensor in encoded.items() if tensor is not None}
        for key, tensor in tensors.items():
            if tensor.is_floating_point():  # one family's are bfloat16
                tensors[key] = tensor.float()
        return tensors

    def as_served(self, encoded: dict[str, Tensor], served_ids: list[int],
                  is_reply: bool = False) -> dict[str, Tensor]:
        """What encode() gave; ValueError shows where its ids and the server's part.

        The template of a reply begins with the end of the completion before it. If the policy has
        sampled that end itself, it is not among the served ids, and is left out.
        """
        ours = encoded["input_ids"][0].tolist()
        sampled_end = int(is_reply and ours[1:] == served_ids)
        ours = ours[sampled_end:]
        for at, (our_id, served_id) in enumerate(zip_longest(ours, served_ids)):
            if our_id != served_id:
                near = [ids[max(0, at - 5):at + 5] for ids in (ours, served_ids)]
                texts = [self.tokenizer.decode(ids) for ids in near]
                raise ValueError(
                    f"from token {at} of the prompt on, processor and server ({len(ours)} and "
                    f"{len(served_ids)} tokens) differ, {near} = {texts}, by other pixel limits on "
                    "the server (mm_processor_kwargs), another chat template, tokenizer, or "
                    "truncation")
        shape = encoded["input_ids"].shape
        return {key: tensor[:, sampled_end:] if tensor.shape == shape else tensor
                for key, tensor in encoded.items()}


def check_places(text: str, reserved: list[str], num_images: int) -> None:
    """ValueError if a prompt, as the chat template wrote it, has other than one place per image.

    A template may leave images out, and it may join texts, tools or its options into a reserved
    string. Of these a family writes some once for each image, and all others never.
    """
    counts = {string: text.count(string) for string in reserved}
    if counts and {0, *counts.values()} != {0, num_images}:
        raise ValueError(f"the chat template writes {counts} into a prompt of {num_images} images")


def placeholders(content: str | list[dict]) -> str | list[dict]:
    """A message's content as chat templates want it: of an image only that it stands there."""
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else {"type": "image"} for part in content]


def collate(encoded: list[dict], prompt_index: Tensor, places: list[tuple[int, int]],
            length: int) -> tuple[dict, dict]:
    """The processor's tensors of all segments -> (model inputs beside the ids, image_rows).

    The last of the segments are replies, each with its place, (row, first column). Token-level
    tensors, (1, tokens of the segment), become (B, length), with 0 over completions. All others are
    concatenated along dim 0, and zero-padded in their other dims to the largest.
    """
    inputs, image_rows = {}, {}
    P = len(encoded) - len(places)
    keys = {key for tensors in encoded for key in tensors} - {"input_ids", "attention_mask"}
    for key in sorted(keys):
        present = [tensors for tensors in encoded if key in tensors]
        if all(tensors[key].shape == tensors["input_ids"].shape for tensors in present):
            lines = [tensors.get(key, torch.zeros_like(tensors["input_ids"]))
                     for tensors in encoded]
            prompts = torch.cat([zero_pad(line, [length]) for line in lines[:P]])  # (P, length)
            inputs[key] = prompts[prompt_index]                                    # (B, length)
            for (row, start), line in zip(places, lines[P:], strict=True):
                inputs[key][row, start:start + line.shape[1]] = line[0]
        else:
            check_dim(key, present)
            shapes = [tensors[key].shape[1:] for tensors in present]
            largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
            inputs[key] = torch.cat([zero_pad(tensors[key], largest) for tensors in present])
            image_rows[key] = [len(tensors.get(key, ())) for tensors in encoded]
    return inputs, image_rows


def check_dim(key: str, encoded: list[dict[str, Tensor]]) -> None:
    """ValueError for the patches of all images side by side along the last dim, not the first.

    That is so where the lines of some grid (images, 2) count as many patches as it has.
    """
    for tensors in encoded:
        *_, height, width = (0, 0, *tensors[key].shape)
        grids = [grid for grid in tensors.values()
                 if grid.dim() == 2 and grid.shape[1] == 2 and not grid.is_floating_point()]
        if tensors[key].dim() == 4 and len(tensors[key]) == 1 and any(
                width == height * grid.prod(1).sum() for grid in grids):
            raise ValueError(
                f"{key} {tuple(tensors[key].shape)} holds its patches along their last dim; the "
                "trainer deals images out along the first one, and cannot train this family")


def zero_pad(tensor: Tensor, sizes: list[int]) -> Tensor:
    """The tensor with zeros after its entries, up to these sizes of all dims but the first."""
    padding = []
    for have, want in zip(tensor.shape[1:], sizes, strict=True):
        padding = [0, want - have, *padding]  # torch counts dims from the last one
    return torch.nn.functional.pad(tensor, padding)


def load_adapter(name: str, processor) -> MultimodalAdapter:
    """The built-in adapter, or the class that name = "module:Class" says; ValueError if none."""
    if not name:
        return MultimodalAdapter(processor)
    module_name, _, class_name = name.partition(":")
    try:
        adapter_class = getattr(importlib.import_module(module_name), class_name)
        return adapter_class(processor=processor, tokenizer=processor.tokenizer)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise ValueError(f'adapter {name!r} is not "module:Class" of a MultimodalAdapter made with '
                         f"processor and tokenizer: {error}") from error

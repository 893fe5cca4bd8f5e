"""The tensors of one optimizer step: what they mean, whether they fit, and how they are cut.

The names of the shapes, here and everywhere: B completions in the step, L padded length, G
completions per prompt (the group), P prompts, V vocabulary; in a micro-batch b completions, with N
tokens in the loss. A row is [prompt | completion | padding]. Position t of every (B, L) tensor
speaks of token t of input_ids: logprobs[:, t] scores input_ids[:, t], so column 0 is 0 and masked.

Where the tensors come from is the adapter's business. What may be wrong with them without an error
anywhere later is checked here, when a batch is made.
"""
import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# What each tensor of a batch holds. Integers and masks become int64, numbers fp32.
PER_TOKEN = {"input_ids": "integers", "attention_mask": "mask", "loss_mask": "mask",
             "behavior_logprobs": "logprobs"}                                            # (B, L)
PER_ROW = {"rewards": "numbers", "prompt_index": "integers", "advantages": "numbers"}    # (B,)
HALF = (torch.bfloat16, torch.float16)


def checked(name: str, value, kind: str, shape: tuple | None = None) -> Tensor:
    """The tensor in the type of its kind, on the CPU; ValueError if it has not what its name says.

    It has no gradient any more, for that would flow through the batch into the policy.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")
    value = value.detach().cpu()
    if shape and value.shape != shape:
        raise ValueError(f"{name} is {tuple(value.shape)}, but must be {tuple(shape)}: "
                         "(B, L) of input_ids, or (B,)")
    is_float = value.is_floating_point()
    fits = True
    if kind == "integers":
        fits = not is_float and value.dtype != torch.bool and (value >= 0).all()
    elif kind == "mask":
        fits = ((value == 0) | (value == 1)).all()
    elif kind == "pixels":
        fits = is_float  # else no processor made them
    elif kind == "logprobs":
        fits = is_float and value.dtype not in HALF  # else what a ratio depends on is lost
    if value.is_complex() or not fits:
        raise ValueError(f"{name} of {value.dtype} must be {kind}: {value.flatten()[:8].tolist()}")
    if kind in ("integers", "mask"):
        return value.long()
    return value.float() if is_float or kind == "numbers" else value


@dataclass
class MultimodalBatch:
    """One row per completion, and the images once per prompt. ValueError names a wrong tensor.

    pixel_values and extra_model_kwargs go to the model. Those of shape (B, L) are token-level. All
    others hold images along dim 0, in segments: image_rows[key][s] of their entries are those of
    segment s. The first segments are the prompts, and row b shows the images of prompt
    prompt_index[b]. Further segments are replies of an environment within a conversation, and
    replies[b] lists those of row b, in the order in which it shows them.

    Without prompt_index every row is a prompt of its own. Without image_rows every row shows one
    image: an entry of the tensor, or the patches that its line of image_grid_thw counts.
    """
    input_ids: Tensor                      # (B, L) int64
    attention_mask: Tensor                 # (B, L) 1 = a token, 0 = padding, which is at the end
    loss_mask: Tensor                      # (B, L) 1 = sampled by the policy, to be trained on
    behavior_logprobs: Tensor              # (B, L) as recorded while sampling
    rewards: Tensor                        # (B,)
    pixel_values: Tensor | None = None
    extra_model_kwargs: dict[str, Tensor] = field(default_factory=dict)
    prompt_index: Tensor | None = None     # (B,) int64
    image_rows: dict[str, list[int]] = field(default_factory=dict)
    replies: list[list[int]] | None = None  # of each row; None: no row shows images but its prompt's
    advantages: Tensor | None = None       # (B,) set by the trainer

    def __post_init__(self):
        if self.prompt_index is None:
            self.prompt_index = torch.arange(len(self.input_ids))
        if self.replies is None:
            self.replies = [[] for _ in range(len(self.input_ids))]
        self.check_types()
        self.check_tokens()
        self.check_numbers()
        self.check_images()

    def check_types(self) -> None:
        """Every field as a tensor of its shape and type, or a ValueError with its name."""
        self.input_ids = checked("input_ids", self.input_ids, "integers")
        if self.input_ids.dim() != 2 or not self.input_ids.numel():
            raise ValueError(f"input_ids is {tuple(self.input_ids.shape)}, but must be (B, L)")
        B_L = self.input_ids.shape
        for name, kind in PER_TOKEN.items():
            setattr(self, name, checked(name, getattr(self, name), kind, B_L))
        for name, kind in PER_ROW.items():
            if name != "advantages" or self.advantages is not None:
                setattr(self, name, checked(name, getattr(self, name), kind, B_L[:1]))
        if self.pixel_values is not None:
            self.pixel_values = checked("pixel_values", self.pixel_values, "pixels")
        twice = self.extra_model_kwargs.keys() & vars(self).keys()
        if twice:
            raise ValueError(f"extra_model_kwargs: {sorted(twice)} are fields of the batch itself")
        self.extra_model_kwargs = {
            key: checked(key, tensor, "any", B_L if key.endswith("token_type_ids") else None)
            for key, tensor in self.extra_model_kwargs.items()}

    def check_tokens(self) -> None:
        """Padding and masks that would train other tokens, or in another context, are refused."""
        if self.loss_mask[:, :1].any():
            raise ValueError("loss_mask: column 0 must be 0, nothing comes before the first token")
        if (self.attention_mask[:, 1:] > self.attention_mask[:, :-1]).any():
            raise ValueError("attention_mask: padding must be at the end of each row, not before "
                             "or between its tokens (a tokenizer needs padding_side='right')")
        if (self.loss_mask > self.attention_mask).any():
            raise ValueError("loss_mask: padding, where attention_mask is 0, cannot be trained on")
        before = self.before_completion()  # (B, L)
        rows = self.loss_mask.any(1).nonzero()[:, 0].tolist()
        prompts, first_row = self.prompt_index.tolist(), {}
        firsts = [first_row.setdefault(prompts[row], row) for row in rows]  # that of their prompt
        for name, tensor in {"tokens": self.input_ids, **self.token_tensors()}.items():
            shown = torch.where(before, tensor, -1)
            differs = (shown[rows] != shown[firsts]).any(1).tolist()
            if any(differs):
                at = differs.index(True)
                raise ValueError(f"prompt_index: rows {firsts[at]} and {rows[at]} are of prompt "
                                 f"{prompts[rows[at]]}, but their {name} before the first one in "
                                 "the loss are not the same")

    def check_numbers(self) -> None:
        """A NaN would be masked later, and train nothing without a word; so it is refused."""
        mask = self.loss_mask.bool()
        trained = self.behavior_logprobs[mask]  # (N,)
        if (trained > 0).any() and not (trained < 0).any():
            raise ValueError("behavior_logprobs: none is negative, so they are probabilities or "
                             "have another sign, but not logprobs")
        # What was recorded of tokens that are not trained means nothing, and may be NaN.
        self.behavior_logprobs = torch.where(mask, self.behavior_logprobs, 0.0)
        for name in ("behavior_logprobs", "rewards", "advantages"):
            values = getattr(self, name)
            if values is not None and not values.isfinite().all():
                raise ValueError(f"{name} must be finite, not so at "
                                 f"{(~values.isfinite()).nonzero()[0].tolist()}")

    def check_images(self) -> None:
        """Every prompt has its own images: of each image tensor a number of entries, in order."""
        tensors = self.image_tensors()
        unknown = self.image_rows.keys() - tensors.keys()
        if unknown:
            raise ValueError(f"image_rows: {sorted(unknown)} are no image tensors of this batch")
        P = int(self.prompt_index.max()) + 1
        listed = sorted(segment for row in self.replies for segment in row)
        if len(self.replies) != len(self) or listed != list(range(P, P + len(listed))):
            raise ValueError(f"replies must list, for each of the {len(self)} rows, segments from "
                             f"{P} on, each of them once, not {self.replies}")
        given, self.image_rows = self.image_rows, {}
        for key, tensor in tensors.items():
            if key in given:
                counts = [int(count) for count in given[key]]
            else:
                counts = self.one_image_per_row(key, tensor)
            self.image_rows[key] = counts
            S = P + len(listed)
            if sum(counts) != len(tensor) or len(counts) != S or min(counts) < 0:
                raise ValueError(f"{key} has {len(tensor)} entries: image_rows[{key!r}] must have "
                                 f"a number for each prompt ({P}) and reply ({S - P}), and these "
                                 "must add up to it")
        self.check_grids()

    def check_grids(self) -> None:
        """Patches go by the lines of image_grid_thw, in each prompt and not only in all of them."""
        grids = self.extra_model_kwargs.get("image_grid_thw")  # (images, 3)
        rows = self.image_rows.get("pixel_values", [])
        if grids is None or grids.prod(1).sum() != sum(rows):
            return  # without images, or of a family that counts otherwise
        patches = [lines.prod(1).sum().item()
                   for lines in grids.split(self.image_rows["image_grid_thw"])]
        if patches != rows:
            raise ValueError(f"image_rows: the prompts have {rows} rows of pixel_values, but by "
                             f"image_grid_thw {patches}")

    def one_image_per_row(self, key: str, tensor: Tensor) -> list[int]:
        """How many entries of an image tensor belong to each row, when each shows one image."""
        if not torch.equal(self.prompt_index, torch.arange(len(self))):
            raise ValueError(f"image_rows[{key!r}] is missing: with a prompt_index it must say how "
                             f"many of the {len(tensor)} entries each prompt has")
        grids = self.extra_model_kwargs.get("image_grid_thw", ())  # (images, 3)
        if len(tensor) != len(self) and len(grids) == len(self):
            return grids.prod(1).tolist()
        return [1] * len(self)

    def __len__(self) -> int:
        return len(self.input_ids)

    def token_tensors(self) -> dict[str, Tensor]:
        """The (B, L) tensors among extra_model_kwargs."""
        shape = self.input_ids.shape
        return {k: v for k, v in self.extra_model_kwargs.items()
                if v.shape == shape and k not in self.image_rows}

    def image_tensors(self) -> dict[str, Tensor]:
        """All other model inputs: images along dim 0, by prompts."""
        tensors = {"pixel_values": self.pixel_values, **self.extra_model_kwargs}
        token_level = self.token_tensors()
        return {k: v for k, v in tensors.items() if v is not None and k not in token_level}

    def images_of(self, segments: list[int]) -> dict[str, Tensor]:
        """The image tensors of these segments, in this order; none where they have no images."""
        images = {}
        for key, tensor in self.image_tensors().items():
            pieces = tensor.split(self.image_rows[key])
            images[key] = torch.cat([tensor[:0], *[pieces[segment] for segment in segments]])
        return {key: tensor for key, tensor in images.items() if len(tensor)}

    def row_segments(self) -> list[int]:
        """The segments that all rows show, row after row: each one's prompt, then its replies."""
        shown = []
        for prompt, replies in zip(self.prompt_index.tolist(), self.replies):
            shown += [prompt, *replies]
        return shown

    def cut_at(self, token_ids: list[int]) -> "MultimodalBatch":
        """The batch with each completion ended before the first of these ids that it sampled.

        A model looks for the image that belongs to a sampled image placeholder, and finds none.
        """
        sampled = torch.isin(self.input_ids, torch.tensor(token_ids)) & self.loss_mask.bool()
        before = sampled.cumsum(1) == 0
        return self.with_fields(**{name: getattr(self, name) * before for name in PER_TOKEN})

    def select(self, rows: list[int]) -> "MultimodalBatch":
        """The given rows, trimmed to their longest, with their own images alone."""
        prompts, prompt_index = self.prompt_index[rows].unique(return_inverse=True)
        segments, replies = prompts.tolist(), []
        for row in torch.as_tensor(rows).tolist():
            end = len(segments) + len(self.replies[row])
            replies.append(list(range(len(segments), end)))
            segments += self.replies[row]
        images = self.images_of(segments)
        image_rows = {key: [self.image_rows[key][s] for s in segments] for key in images}
        width = self.attention_mask[rows].sum(1).max()
        tokens = {key: tensor[rows, :width] for key, tensor in self.token_tensors().items()}
        advantages = None
        if self.advantages is not None:
            advantages = self.advantages[rows]
        return self.with_fields(
            **{name: getattr(self, name)[rows, :width] for name in PER_TOKEN},
            rewards=self.rewards[rows], advantages=advantages, prompt_index=prompt_index,
            pixel_values=images.pop("pixel_values", None), extra_model_kwargs=tokens | images,
            image_rows=image_rows, replies=replies)

    def parts(self, count: int) -> list["MultimodalBatch"]:
        """The batch dealt out to `count` optimizer steps, each prompt's completions to one of them.

        With fewer prompts than that, fewer parts.
        """
        if count == 1:
            return [self]
        rows_of = [(self.prompt_index % count == part).nonzero()[:, 0].tolist()
                   for part in range(count)]
        return [self.select(rows) for rows in rows_of if rows]

    def turns(self, size: int, ranks: int = 1) -> list[list["MultimodalBatch"]]:
        """What is forwarded, as a batch for each rank (or for some of them) and turn.

        The ranks of a sharded model must make the same calls. So those of a turn are alike: all
        with images in prompts or all without, the same for replies, and neighbours in length.
        """
        turns = []
        for kind in (True, True), (True, False), (False, True), (False, False):
            alike = [chunk for chunk in self.chunks(size, ranks) if chunk.shows() == kind]
            turns += [alike[i:i + ranks] for i in range(0, len(alike), ranks)]
        return turns

    def shows(self) -> tuple[bool, bool]:
        """Whether there are images in prompts, and in replies."""
        P = int(self.prompt_index.max()) + 1
        counts = list(self.image_rows.values())
        return any(sum(c[:P]) > 0 for c in counts), any(sum(c[P:]) > 0 for c in counts)

    def chunks(self, size: int, ranks: int = 1) -> list["MultimodalBatch"]:
        """The rows of one prompt, or those of several that are `size` rows together at most.

        They hold the rows that have a gradient: a token in the loss and an advantage. If no row
        has one, a few rows are forwarded all the same, for the metrics. Prompts with the longest
        rows come first, and so neighbours are alike in length.

        With several ranks a prompt is in two chunks where some ranks would get nothing, or where
        its replies have images: then a chunk is one piece, for all pieces of a turn must be alike.
        """
        trained = self.loss_mask.any(1)                                          # (B,)
        rows = (trained & (self.advantages != 0)).nonzero()[:, 0].tolist()
        if not rows:
            rows = trained.nonzero()[:size, 0].tolist()
        prompts, lengths = self.prompt_index.tolist(), self.attention_mask.sum(1).tolist()
        rows_of = {}  # by prompt
        for row in sorted(rows, key=lambda row: -lengths[row]):
            rows_of.setdefault(prompts[row], []).append(row)
        most = math.ceil(len(rows) / ranks)
        if ranks > 1 and self.shows()[1]:
            most = min(most, size)
        chunks = [[]]
        for group in rows_of.values():
            if len(chunks[-1]) + len(group) > min(size, most):
                chunks += [group[i:i + most] for i in range(0, len(group), most)]
            else:
                chunks[-1] += group
        return [self.select(rows) for rows in chunks if rows]

    def pieces(self, size: int) -> list["MultimodalBatch"]:
        """The micro-batches: at most `size` rows each, trimmed to their longest.

        They keep the images of the whole, and the numbers by which its prompts are known.
        """
        pieces = []
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            width = self.attention_mask[rows].sum(1).max()
            tokens = {key: tensor[rows, :width] for key, tensor in self.token_tensors().items()}
            pieces.append(self.with_fields(
                **{name: getattr(self, name)[rows, :width] for name in PER_TOKEN},
                **{name: getattr(self, name)[rows] for name in PER_ROW},
                extra_model_kwargs=self.extra_model_kwargs | tokens, replies=self.replies[rows]))
        return pieces

    def to(self, device) -> "MultimodalBatch":
        """The batch on this device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        extra = {k: v.to(device) for k, v in self.extra_model_kwargs.items()}
        return self.with_fields(**moved, extra_model_kwargs=extra)

    def with_fields(self, **fields) -> "MultimodalBatch":
        """A copy with other fields, made of this batch's own, which are not checked again."""
        batch = copy.copy(self)
        vars(batch).update(fields)
        return batch

    def before_completion(self) -> Tensor:
        """(B, L) bool: the tokens before the first sampled one of their row."""
        return self.attention_mask.bool() & (self.loss_mask.cumsum(1) == 0)

    def spans(self) -> tuple[list[int], list[int]]:
        """Where the completion of each row starts (its first sampled token) and where it ends."""
        return self.before_completion().sum(1).tolist(), self.attention_mask.sum(1).tolist()

    def first_rows(self) -> list[int]:
        """For each prompt the first of its rows."""
        index = self.prompt_index.tolist()
        return [index.index(prompt) for prompt in range(max(index) + 1)]

    def sharing_pays(self, hidden_size: int) -> bool:
        """Whether forwarding each prompt once is clearly less work, padding included.

        The work of a token is 24 H^2 flops in a layer, H the hidden size, and 4 H for each token
        that it attends to. An entry of pixel_values (a patch, in the Qwen families) counts as one.
        """
        starts, ends = self.spans()
        first_rows = self.first_rows()
        P, (B, L) = len(first_rows), self.input_ids.shape
        W_p = max(starts[row] for row in first_rows)
        W_c = max(end - start for start, end in zip(starts, ends))
        pair = 1 / (6 * hidden_size)
        shown = self.row_segments()
        patches = torch.tensor(self.image_rows.get("pixel_values", [0] * (1 + max(shown))))
        once = P * W_p * (1 + W_p * pair) + B * W_c * (1 + (W_p + W_c) * pair) + patches.sum()
        alone = B * L * (1 + L * pair) + patches[shown].sum()
        return bool(once < 0.9 * alone)

    def prompt_inputs(self) -> dict[str, Tensor]:
        """Each prompt once: the model inputs (P, W_p), padded on the left.

        A prompt ends before the first token in the loss of its rows. ValueError if one has no row.

        >>> ids = torch.tensor([[7, 8, 1, 2, 3], [7, 8, 4, 0, 0], [9, 5, 6, 0, 0]])
        >>> loss_mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]])
        >>> batch = MultimodalBatch(ids, ids.sign(), loss_mask, torch.zeros(3, 5), torch.zeros(3),
        ...                         prompt_index=torch.tensor([0, 0, 1]))
        >>> batch.prompt_inputs()["input_ids"].tolist()
        [[7, 8], [0, 9]]
        >>> completions, trained = batch.completion_inputs()
        >>> completions["input_ids"].tolist()
        [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
        """
        if len(self.prompt_index.unique()) <= self.prompt_index.max():
            raise ValueError("prompt_index: a prompt has no row; select() numbers them anew")
        starts, _ = self.spans()

        def prompts(tensor: Tensor) -> Tensor:
            pieces = [tensor[row, :starts[row]] for row in self.first_rows()]
            return pad_sequence(pieces, batch_first=True, padding_side="left")

        return {key: prompts(tensor) for key, tensor in self.token_inputs().items()}

    def completion_inputs(self) -> tuple[dict[str, Tensor], Tensor]:
        """Each row from its first token in the loss on: model inputs (B, W_c), padded on the right.

        And which of their tokens are in the loss, (B, W_c) bool. ValueError if a row has none.
        """
        starts, ends = self.spans()
        if any(start == end for start, end in zip(starts, ends)):
            raise ValueError("loss_mask: a row without a token in the loss has no place where its "
                             "completion begins; select() the others")

        def completions(tensor: Tensor) -> Tensor:
            pieces = [row[start:end] for row, start, end in zip(tensor, starts, ends)]
            return pad_sequence(pieces, batch_first=True)

        inputs = {key: completions(tensor) for key, tensor in self.token_inputs().items()}
        return inputs, completions(self.loss_mask).bool()

    def token_inputs(self) -> dict[str, Tensor]:
        """The (B, L) model inputs."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask,
                **self.token_tensors()}

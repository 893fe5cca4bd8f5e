"""The tensors of one optimizer step, and their micro-batches.

B completions in the step, L padded length, G completions per prompt, V vocabulary.
Row b is one completion behind its prompt: [prompt | completion | padding]. Position t of every
(B, L) tensor speaks of token t of input_ids: logprobs[:, t] scores input_ids[:, t], so column 0
is 0 and masked. Where the rows came from (HTTP, images, files) is not known here.
"""
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

PAD = 0  # any valid id will do: padding is masked by length, never recognised by its value


@dataclass
class MultimodalBatch:
    """One row per completion; images once per prompt.

    pixel_values and the entries of extra_model_kwargs go to the model as they are. An entry of
    shape (B, L) is token-level and is cut like input_ids. Every other one holds images along
    dim 0, prompt after prompt: image_rows[key][p] of its entries belong to prompt p, and row b
    shows the images of prompt prompt_index[b]. Rows of one prompt share a forward of it.
    Both may be left out when every row brings its own images and their number can be told.

    Raises ValueError naming the tensor whose shape does not fit.
    """
    input_ids: Tensor                       # (B, L) int64
    attention_mask: Tensor                  # (B, L) 1 = a token, 0 = padding
    loss_mask: Tensor                       # (B, L) 1 = sampled by the policy and trained on
    behavior_logprobs: Tensor               # (B, L) at the sampling temperature, 0 off the mask
    rewards: Tensor                         # (B,)
    pixel_values: Tensor | None = None
    extra_model_kwargs: dict[str, Tensor] = field(default_factory=dict)
    prompt_index: Tensor | None = None      # (B,) int64
    image_rows: dict[str, list[int]] = field(default_factory=dict)
    advantages: Tensor | None = None        # (B,) the trainer's, from the rewards of the group

    def __post_init__(self):
        shape = tuple(self.input_ids.shape)
        if len(shape) != 2:
            raise ValueError(f"input_ids must be (B, L), not {shape}")
        for name in ("attention_mask", "loss_mask", "behavior_logprobs"):
            given = tuple(getattr(self, name).shape)
            if given != shape:
                hint = ("; it must be (B, L): column t scores token t, column 0 is 0"
                        if given == (shape[0], shape[1] - 1) else "")
                raise ValueError(f"{name} is {given}, but input_ids is (B, L) = {shape}{hint}")
        for name in ("rewards", "prompt_index", "advantages"):
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape[:1]:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, but must be (B,) = {shape[:1]}")
        if shape[1] and self.loss_mask[:, 0].any():
            raise ValueError("loss_mask: column 0 must be 0, nothing comes before the first token")
        if self.prompt_index is None:
            self.prompt_index = torch.arange(shape[0])
        for key, tensor in self.image_tensors().items():
            if key not in self.image_rows:
                self.image_rows[key] = self._guess_rows(key, tensor)
            rows = self.image_rows[key]
            if sum(rows) != len(tensor):
                raise ValueError(f"{key} has {len(tensor)} entries along dim 0, but image_rows"
                                 f"[{key!r}] adds up to {sum(rows)}")

    def _guess_rows(self, key: str, tensor: Tensor) -> list[int]:
        """Entries per row where the adapter did not say: one each, or by the patch grids."""
        if len(tensor) == len(self):
            return [1] * len(self)
        grid = self.extra_model_kwargs.get("image_grid_thw")
        if key == "pixel_values" and grid is not None and len(grid) == len(self):
            return grid.prod(-1).tolist()
        raise ValueError(f"{key} has {len(tensor)} entries along dim 0 for {len(self)} rows: say in "
                         f"image_rows[{key!r}] how many belong to each prompt")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def image_tensors(self) -> dict[str, Tensor]:
        """The model kwargs that hold images along dim 0."""
        every = {"pixel_values": self.pixel_values, **self.extra_model_kwargs}
        return {k: v for k, v in every.items()
                if v is not None and tuple(v.shape) != tuple(self.input_ids.shape)}

    def token_tensors(self) -> dict[str, Tensor]:
        """The extra model kwargs of shape (B, L), such as mm_token_type_ids."""
        return {k: v for k, v in self.extra_model_kwargs.items()
                if tuple(v.shape) == tuple(self.input_ids.shape)}

    def lengths(self) -> Tensor:
        """(B,) one past the last real token of each row."""
        positions = torch.arange(1, self.input_ids.shape[1] + 1, device=self.input_ids.device)
        return (self.attention_mask.bool() * positions).amax(1)

    def prompt_lengths(self) -> Tensor:
        """(B,) tokens before the first one that is trained on; the row's length if none is."""
        first = self.loss_mask.bool().int().argmax(1)
        return torch.where(self.loss_mask.bool().any(1), first, self.lengths())

    def cut_at(self, token_ids: list[int]) -> "MultimodalBatch":
        """End each completion before its first token of token_ids.

        A policy can sample an image placeholder. The model would look for an image behind it,
        so it and what follows it are taken out of the row, and out of the loss.
        """
        bad = torch.isin(self.input_ids, torch.tensor(token_ids)) & self.loss_mask.bool()
        if not bad.any():
            return self
        kept = bad.cumsum(1) == 0
        return replace(self, input_ids=self.input_ids.where(kept, torch.tensor(PAD)),
                       attention_mask=self.attention_mask * kept, loss_mask=self.loss_mask * kept,
                       behavior_logprobs=self.behavior_logprobs * kept)

    def select(self, rows: Tensor) -> "MultimodalBatch":
        """The given rows, trimmed to their longest, with the images of their prompts."""
        prompts, prompt_index = self.prompt_index[rows].unique(return_inverse=True)
        width = int(self.lengths()[rows].max())
        cut = {name: getattr(self, name)[rows, :width] for name in
               ("input_ids", "attention_mask", "loss_mask", "behavior_logprobs")}
        images = {}
        for key, tensor in self.image_tensors().items():
            pieces = tensor.split(self.image_rows[key])
            images[key] = torch.cat([pieces[p] for p in prompts.tolist()])
        images = {key: tensor for key, tensor in images.items() if len(tensor)}
        image_rows = {key: [self.image_rows[key][p] for p in prompts.tolist()] for key in images}
        tokens = {key: tensor[rows, :width] for key, tensor in self.token_tensors().items()}
        advantages = None if self.advantages is None else self.advantages[rows]
        return MultimodalBatch(**cut, rewards=self.rewards[rows], prompt_index=prompt_index,
                               pixel_values=images.pop("pixel_values", None),
                               extra_model_kwargs={**tokens, **images}, image_rows=image_rows,
                               advantages=advantages)

    def micro_batches(self, size: int) -> Iterator["MultimodalBatch"]:
        """Chunks of at most `size` completions: prompt by prompt, of similar length.

        Rows without a token in the loss are left out, and so are rows whose advantage is 0:
        they have no gradient. One chunk is always given, to keep the metrics alive.
        """
        lengths = self.lengths()
        longest = torch.zeros(int(self.prompt_index.max()) + 1, dtype=lengths.dtype)
        longest.scatter_reduce_(0, self.prompt_index, lengths, "amax")
        keep = self.loss_mask.bool().any(1)
        if self.advantages is not None and (keep & (self.advantages != 0)).any():
            keep &= self.advantages != 0
        elif keep.any():
            keep &= keep.cumsum(0) <= size
        order = sorted(keep.nonzero().flatten().tolist(), key=lambda b: (
            -int(longest[self.prompt_index[b]]), int(self.prompt_index[b]), -int(lengths[b])))
        for start in range(0, len(order), size):
            yield self.select(torch.tensor(order[start:start + size]))

    def to(self, device) -> "MultimodalBatch":
        """The batch with every tensor on the device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()}
        moved["extra_model_kwargs"] = {k: v.to(device) for k, v in self.extra_model_kwargs.items()}
        return MultimodalBatch(**moved)

    def sharing_pays(self, hidden_size: int) -> bool:
        """Whether forwarding each prompt once is less work than every row on its own.

        In tokens: a token costs about 24 H^2 flops in each layer, a pair of tokens in attention
        4 H, an image patch about a token. Rows of one prompt must begin alike.
        """
        lengths, prompts = self.lengths(), self.prompt_lengths()
        b, p = len(self), int(self.prompt_index.max()) + 1
        width, prompt = self.input_ids.shape[1], int(prompts.max())
        completion = int((lengths - prompts).max())
        patches = self.image_rows.get("pixel_values", [])
        per_pair = 1 / (6 * hidden_size)
        plain = (b * (width + width**2 * per_pair)
                 + sum(patches[i] for i in self.prompt_index.tolist() if patches))
        shared = (p * (prompt + prompt**2 * per_pair) + sum(patches)
                  + b * completion * (1 + (prompt + completion) * per_pair))
        return p < b and shared < 0.9 * plain

    def fork(self) -> "Fork":
        """The same rows cut where the prompt ends, prompts once: see Policy in train.py.

        >>> batch = MultimodalBatch(
        ...     input_ids=torch.tensor([[7, 8, 1, 2, 3], [7, 8, 4, 0, 0], [9, 5, 6, 0, 0]]),
        ...     attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]),
        ...     loss_mask=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]),
        ...     behavior_logprobs=torch.zeros(3, 5), rewards=torch.zeros(3),
        ...     prompt_index=torch.tensor([0, 0, 1]))
        >>> fork = batch.fork()
        >>> fork.prompt_ids.tolist()       # two prompts instead of three, left-padded
        [[7, 8], [0, 9]]
        >>> fork.completion_ids.tolist()   # one line per completion, right-padded
        [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
        """
        lengths, prompts = self.lengths(), self.prompt_lengths()
        rows = torch.arange(len(self), device=prompts.device)
        first = rows.new_zeros(int(self.prompt_index.max()) + 1)  # (P,) a row of each prompt
        first.scatter_reduce_(0, self.prompt_index, rows, "amin", include_self=False)
        width = int(prompts.max())
        total = width + int((lengths - prompts).max())
        source = torch.arange(total, device=first.device) - (width - prompts)[:, None]  # (b, W)
        real = (source >= 0) & (source < lengths[:, None])
        source = source.clamp(0, self.input_ids.shape[1] - 1)

        def align(tensor: Tensor) -> Tensor:
            return tensor.gather(1, source).where(real, torch.zeros_like(tensor[:1, :1]))

        ids, mask = align(self.input_ids), align(self.attention_mask)
        return Fork(ids[first, :width], mask[first, :width], ids[:, width:], mask[:, width:],
                    align(self.loss_mask)[:, width:],
                    {key: align(t)[first, :width] for key, t in self.token_tensors().items()})


@dataclass
class Fork:
    """P prompts and b completions that continue them; widths W_p and W_c."""
    prompt_ids: Tensor            # (P, W_p), left-padded
    prompt_mask: Tensor           # (P, W_p)
    completion_ids: Tensor        # (b, W_c), right-padded
    completion_mask: Tensor       # (b, W_c)
    completion_loss_mask: Tensor  # (b, W_c)
    prompt_tokens: dict[str, Tensor]  # token-level model kwargs of the prompts

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

PER_TOKEN = ("attention_mask", "loss_mask", "behavior_logprobs")
PER_ROW = ("rewards", "prompt_index", "advantages")
PAD = 0  # any valid id will do: padding is masked by length, never recognised by its value


@dataclass
class MultimodalBatch:
    """One row per completion; images once per prompt. Raises ValueError naming a wrong tensor.

    pixel_values and extra_model_kwargs go to the model as they are. Those of shape (B, L) are
    token-level and cut like input_ids. All others hold images along dim 0, prompt after prompt:
    image_rows[key][p] entries belong to prompt p, and row b shows those of prompt_index[b].
    Rows of one prompt share its forward. An adapter may leave out both fields if every row
    brings its own images and one entry (or, for patches, one grid) each.
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
    advantages: Tensor | None = None       # (B,) set by the trainer

    def __post_init__(self):
        shape = tuple(self.input_ids.shape)
        for name in PER_TOKEN:
            given = tuple(getattr(self, name).shape)
            if given != shape or len(shape) != 2:
                hint = ("; it must be (B, L): column t scores token t, column 0 is 0"
                        if given == (shape[0], shape[-1] - 1) else "")
                raise ValueError(f"{name} is {given}, but input_ids is (B, L) = {shape}{hint}")
        if self.prompt_index is None:
            self.prompt_index = torch.arange(shape[0])
        for name in PER_ROW:
            given = getattr(self, name)
            if given is not None and tuple(given.shape) != shape[:1]:
                raise ValueError(f"{name} is {tuple(given.shape)}, but must be (B,) = {shape[:1]}")
        if self.loss_mask[:, :1].any():
            raise ValueError("loss_mask: column 0 must be 0, nothing comes before the first token")
        grid = self.extra_model_kwargs.get("image_grid_thw")
        for key, tensor in self.image_tensors().items():
            if key not in self.image_rows and len(tensor) == len(self):
                self.image_rows[key] = [1] * len(self)
            elif key not in self.image_rows and grid is not None and len(grid) == len(self):
                self.image_rows[key] = grid.prod(-1).tolist()
            if sum(self.image_rows.get(key, [])) != len(tensor):
                raise ValueError(f"{key} has {len(tensor)} entries along dim 0; image_rows[{key!r}]"
                                 " must say how many belong to each prompt, and add up to that")

    def __len__(self) -> int:
        return len(self.input_ids)

    def token_tensors(self) -> dict[str, Tensor]:
        """The extra model kwargs of shape (B, L), such as mm_token_type_ids."""
        return {k: v for k, v in self.extra_model_kwargs.items() if v.shape == self.input_ids.shape}

    def image_tensors(self) -> dict[str, Tensor]:
        """The model kwargs that hold images along dim 0."""
        every = {"pixel_values": self.pixel_values, **self.extra_model_kwargs}
        return {k: v for k, v in every.items()
                if v is not None and v.shape != self.input_ids.shape}

    def images_of(self, prompts: list[int]) -> dict[str, Tensor]:
        """The image tensors of these prompts, in this order; none where they have no images."""
        pieces = {k: v.split(self.image_rows[k]) for k, v in self.image_tensors().items()}
        found = {k: torch.cat([v[p] for p in prompts]) for k, v in pieces.items()}
        return {k: v for k, v in found.items() if len(v)}

    def lengths(self) -> Tensor:
        """(B,) tokens of each row."""
        return self.attention_mask.sum(1)

    def prompt_lengths(self) -> Tensor:
        """(B,) tokens before the first one that is trained on; the row's length if none is."""
        trained = self.loss_mask.bool()
        return torch.where(trained.any(1), trained.int().argmax(1), self.lengths())

    def cut_at(self, token_ids: list[int]) -> "MultimodalBatch":
        """End each completion before its first token of token_ids.

        A policy can sample an image placeholder. The model would look for an image behind it,
        so it and what follows it are taken out of the row, and out of the loss.
        """
        bad = torch.isin(self.input_ids, torch.tensor(token_ids)) & self.loss_mask.bool()
        kept = bad.cumsum(1) == 0
        return replace(self, input_ids=self.input_ids.where(kept, torch.tensor(PAD)),
                       **{name: getattr(self, name) * kept for name in PER_TOKEN})

    def select(self, rows: Tensor) -> "MultimodalBatch":
        """The given rows, trimmed to their longest, with the images of their prompts alone."""
        prompts, prompt_index = self.prompt_index[rows].unique(return_inverse=True)
        images = self.images_of(prompts.tolist())
        width = int(self.lengths()[rows].max())
        token = {name: getattr(self, name)[rows, :width] for name in ("input_ids", *PER_TOKEN)}
        extra = {key: tensor[rows, :width] for key, tensor in self.token_tensors().items()}
        return MultimodalBatch(
            **token, rewards=self.rewards[rows], prompt_index=prompt_index,
            advantages=None if self.advantages is None else self.advantages[rows],
            image_rows={k: [self.image_rows[k][p] for p in prompts.tolist()] for k in images},
            pixel_values=images.pop("pixel_values", None), extra_model_kwargs={**extra, **images})

    def micro_batches(self, size: int) -> Iterator["MultimodalBatch"]:
        """At most `size` completions each, prompt by prompt, of similar length.

        Rows without a token in the loss or with an advantage of 0 have no gradient and are left
        out; but for a few if there are no others, so that the metrics stay alive.
        """
        lengths = self.lengths()
        longest = lengths.new_zeros(len(self)).scatter_reduce(0, self.prompt_index, lengths, "amax")
        keep = self.loss_mask.bool().any(1)
        if (keep & (self.advantages != 0)).any():
            keep &= self.advantages != 0
        else:
            keep &= keep.cumsum(0) <= size
        order = sorted(keep.nonzero().flatten().tolist(), key=lambda b: (
            -longest[self.prompt_index[b]].item(), self.prompt_index[b].item(), -lengths[b].item()))
        for start in range(0, len(order), size):
            yield self.select(torch.tensor(order[start:start + size]))

    def to(self, device) -> "MultimodalBatch":
        """The batch with every tensor on the device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved["extra_model_kwargs"] = {k: v.to(device) for k, v in self.extra_model_kwargs.items()}
        return MultimodalBatch(**{name: value.to(device) if isinstance(value, Tensor) else value
                                  for name, value in moved.items()})

    def sharing_pays(self, hidden_size: int) -> bool:
        """Whether forwarding each prompt once is less work than every row with its own.

        Counted in tokens. In a layer of hidden size H a token costs about 24 H^2 flops and a
        pair of tokens in attention 4 H; an image patch counts as a token.
        """
        b, p = len(self), int(self.prompt_index.max()) + 1
        prompt = int(self.prompt_lengths().max())
        rest, width = int((self.lengths() - self.prompt_lengths()).max()), self.input_ids.shape[1]
        patches = self.image_rows.get("pixel_values", [0] * p)
        plain = b * width * (1 + width / (6 * hidden_size))
        plain += sum(patches[i] for i in self.prompt_index.tolist())
        shared = p * prompt * (1 + prompt / (6 * hidden_size)) + sum(patches)
        shared += b * rest * (1 + (prompt + rest) / (6 * hidden_size))
        return shared < 0.9 * plain

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
        rows, width = torch.arange(len(self), device=lengths.device), int(prompts.max())
        first = rows.new_zeros(int(self.prompt_index.max()) + 1)  # (P,) a row of each prompt
        first.scatter_reduce_(0, self.prompt_index, rows, "amin", include_self=False)
        total = width + int((lengths - prompts).max())
        source = torch.arange(total, device=lengths.device) - (width - prompts)[:, None]
        real = (source >= 0) & (source < lengths[:, None])  # (b, W_p + W_c)
        source = source.clamp(0, self.input_ids.shape[1] - 1)

        def align(tensor: Tensor) -> Tensor:
            return tensor.gather(1, source) * real

        ids, mask = align(self.input_ids), align(self.attention_mask)
        return Fork(ids[first, :width], mask[first, :width], ids[:, width:], mask[:, width:],
                    align(self.loss_mask)[:, width:].bool(),
                    {key: align(t)[first, :width] for key, t in self.token_tensors().items()})


@dataclass
class Fork:
    """P prompts, and b completions that continue them."""
    prompt_ids: Tensor                # (P, W_p), left-padded
    prompt_mask: Tensor               # (P, W_p)
    completion_ids: Tensor            # (b, W_c), right-padded
    completion_mask: Tensor           # (b, W_c)
    trained: Tensor                   # (b, W_c) bool, the loss mask
    prompt_tokens: dict[str, Tensor]  # token-level model kwargs, (P, W_p)

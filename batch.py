"""The tensors of one optimizer step, and their micro-batches.

B completions in the step, L padded length, G completions per prompt, V vocabulary.
Row b is [prompt | completion | padding]. Position t of every (B, L) tensor speaks of token t of
input_ids: logprobs[:, t] scores input_ids[:, t], so column 0 is 0 and masked.
"""
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PER_TOKEN = ("input_ids", "attention_mask", "loss_mask", "behavior_logprobs")
PER_ROW = ("rewards", "prompt_index", "advantages")


@dataclass
class MultimodalBatch:
    """One row per completion; images once per prompt. Raises ValueError naming a wrong tensor.

    pixel_values and extra_model_kwargs go to the model as they are. Those of shape (B, L) are
    token-level and cut like input_ids. All others hold images along dim 0: image_rows[key][p]
    entries belong to prompt p, and row b shows those of prompt_index[b]. Both may be left out if
    every row brings its own images, one entry (for patches, one grid) each.
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
        if self.prompt_index is None:
            self.prompt_index = torch.arange(len(self))
        for name in PER_TOKEN + PER_ROW:
            given, wanted = getattr(self, name), self.input_ids.shape[:1 + (name in PER_TOKEN)]
            if given is not None and given.shape != wanted:
                raise ValueError(f"{name} is {tuple(given.shape)}, but must be {tuple(wanted)}: "
                                 "the (B, L) of input_ids per token, (B,) per row")
        if self.loss_mask[:, :1].any():
            raise ValueError("loss_mask: column 0 must be 0, nothing comes before the first token")
        grid = self.extra_model_kwargs.get("image_grid_thw", ())
        for key, tensor in self.image_tensors().items():
            patches = grid.prod(-1).tolist() if len(grid) == len(self) else []
            own = [1] * len(self) if len(tensor) == len(self) else patches
            if sum(self.image_rows.setdefault(key, own)) != len(tensor):
                raise ValueError(f"{key} has {len(tensor)} entries along dim 0; image_rows[{key!r}]"
                                 " must say how many belong to each prompt, and add up to that")

    def __len__(self) -> int:
        return len(self.input_ids)

    def token_tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.extra_model_kwargs.items() if v.shape == self.input_ids.shape}

    def image_tensors(self) -> dict[str, Tensor]:
        every = {"pixel_values": self.pixel_values, **self.extra_model_kwargs}
        return {k: v for k, v in every.items() if v is not None and k not in self.token_tensors()}

    def images_of(self, prompts: list[int]) -> dict[str, Tensor]:
        """The image tensors of these prompts, in this order; none where they have no images."""
        pieces = {k: v.split(self.image_rows[k]) for k, v in self.image_tensors().items()}
        found = {k: torch.cat([v[p] for p in prompts]) for k, v in pieces.items()}
        return {k: v for k, v in found.items() if len(v)}

    def lengths(self) -> Tensor:  # (B,)
        return self.attention_mask.sum(1)

    def prompt_lengths(self) -> Tensor:
        """(B,) tokens before the first one that is trained on; the row's length if none is."""
        trained = self.loss_mask.bool()
        return torch.where(trained.any(1), trained.int().argmax(1), self.lengths())

    def cut_at(self, token_ids: list[int]) -> "MultimodalBatch":
        """End each completion before its first token of token_ids.

        A sampled image placeholder would make the model look for an image behind it.
        """
        bad = torch.isin(self.input_ids, torch.tensor(token_ids)) & self.loss_mask.bool()
        kept = bad.cumsum(1) == 0
        return replace(self, **{k: getattr(self, k) * kept for k in PER_TOKEN})

    def select(self, rows: Tensor) -> "MultimodalBatch":
        """The given rows, trimmed to their longest, with the images of their prompts alone."""
        prompts, prompt_index = self.prompt_index[rows].unique(return_inverse=True)
        images, width = self.images_of(prompts.tolist()), int(self.lengths()[rows].max())
        tokens = {key: tensor[rows, :width] for key, tensor in self.token_tensors().items()}
        return MultimodalBatch(
            **{name: getattr(self, name)[rows, :width] for name in PER_TOKEN},
            rewards=self.rewards[rows], prompt_index=prompt_index,
            advantages=None if self.advantages is None else self.advantages[rows],
            image_rows={k: [self.image_rows[k][p] for p in prompts.tolist()] for k in images},
            pixel_values=images.pop("pixel_values", None), extra_model_kwargs=tokens | images)

    def micro_batches(self, size: int) -> Iterator["MultimodalBatch"]:
        """At most `size` completions each, prompt by prompt, of similar length.

        Rows without gradient (no token in the loss, advantage 0) are left out; but for a few if
        there are no others, so that the metrics stay alive.
        """
        lengths, prompts, keep = self.lengths(), self.prompt_index, self.loss_mask.bool().any(1)
        longest = lengths.new_zeros(len(self)).scatter_reduce(0, prompts, lengths, "amax")[prompts]
        alive = keep & (self.advantages != 0)
        keep = alive if alive.any() else keep & (keep.cumsum(0) <= size)
        keys = torch.stack([-longest, prompts, -lengths], 1).tolist()
        order = sorted(keep.nonzero()[:, 0].tolist(), key=keys.__getitem__)
        for start in range(0, len(order), size):
            yield self.select(torch.tensor(order[start:start + size]))

    def to(self, device) -> "MultimodalBatch":
        moved = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        extra = {name: v.to(device) for name, v in self.extra_model_kwargs.items()}
        return replace(self, **moved, extra_model_kwargs=extra)

    def sharing_pays(self, hidden_size: int) -> bool:
        """Whether forwarding each prompt once is clearly less work, in tokens of a layer of size H.

        A token costs about 24 H^2 flops, a pair in attention 4 H; a patch counts as a token.
        """
        def cost(rows, queries, keys):
            return rows * queries * (1 + keys / (6 * hidden_size))

        lengths, prompts = self.lengths(), self.prompt_lengths()
        length, prompt, rest = lengths.max(), prompts.max(), (lengths - prompts).max()
        b, p = len(self), self.prompt_index.max() + 1
        patches = torch.tensor(self.image_rows.get("pixel_values", [0] * p))
        shared = cost(p, prompt, prompt) + cost(b, rest, prompt + rest) + patches.sum()
        return bool(shared < 0.9 * (cost(b, length, length) + patches[self.prompt_index].sum()))

    def fork(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """The rows cut where the prompt ends: (prompts, completions, what is trained).

        The dicts are model inputs, (P, W_p) and (b, W_c). Policy in train.py says what for.
        >>> batch = MultimodalBatch(
        ...     input_ids=torch.tensor([[7, 8, 1, 2, 3], [7, 8, 4, 0, 0], [9, 5, 6, 0, 0]]),
        ...     attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]),
        ...     loss_mask=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]),
        ...     behavior_logprobs=torch.zeros(3, 5), rewards=torch.zeros(3),
        ...     prompt_index=torch.tensor([0, 0, 1]))
        >>> prompts, completions, trained = batch.fork()
        >>> prompts["input_ids"].tolist()       # two prompts instead of three, left-padded
        [[7, 8], [0, 9]]
        >>> completions["input_ids"].tolist()   # one line per completion, right-padded
        [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
        """
        def cut(tensor, spans, side="right"):
            pieces = [tensor[row, start:end] for row, start, end in spans]
            return pad_sequence(pieces, batch_first=True, padding_side=side)

        index, starts = self.prompt_index.tolist(), self.prompt_lengths().tolist()
        first_rows = [index.index(prompt) for prompt in range(max(index) + 1)]
        prompts = [(row, 0, starts[row]) for row in first_rows]
        completions = list(zip(range(len(self)), starts, self.lengths().tolist()))
        tokens = {"input_ids": self.input_ids, "attention_mask": self.attention_mask,
                  **self.token_tensors()}
        return ({key: cut(tensor, prompts, "left") for key, tensor in tokens.items()},
                {key: cut(tensor, completions) for key, tensor in tokens.items()},
                cut(self.loss_mask, completions).bool())

"""The tensors of one optimizer step, and their micro-batches.

B completions in the step, L padded length, G completions per prompt, V vocabulary. Row b is
[prompt | completion | padding]. Position t of every (B, L) tensor speaks of token t of input_ids:
logprobs[:, t] scores input_ids[:, t], so column 0 is 0 and masked.
"""
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PER_TOKEN = ("input_ids", "attention_mask", "loss_mask", "behavior_logprobs")


@dataclass
class MultimodalBatch:
    """One row per completion; images once per prompt. Raises ValueError naming a wrong tensor.

    pixel_values and extra_model_kwargs go to the model; those of shape (B, L) are token-level, all
    others hold images along dim 0: image_rows[key][p] entries belong to prompt p, and row b shows
    those of prompt_index[b]. Without these two every row has one image, or one grid, of its own.
    own[b] lists more entries of image_rows, those of row b's later turns.
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
    own: list[list[int]] | None = None
    advantages: Tensor | None = None       # (B,) set by the trainer

    def __post_init__(self):
        if self.prompt_index is None:
            self.prompt_index = torch.arange(len(self))
        self.own = self.own or [[] for _ in range(len(self))]
        for name in PER_TOKEN + ("rewards", "prompt_index", "advantages"):
            given, wanted = getattr(self, name), self.input_ids.shape[:1 + (name in PER_TOKEN)]
            if given is not None and given.shape != wanted:
                raise ValueError(f"{name} is {tuple(given.shape)}, but must be {tuple(wanted)}: "
                                 "(B, L) of input_ids, or (B,)")
        if self.loss_mask[:, :1].any():
            raise ValueError("loss_mask: column 0 must be 0, nothing comes before the first token")
        grids = self.extra_model_kwargs.get("image_grid_thw", torch.empty(0, 3))
        for key, tensor in self.image_tensors().items():
            own = [1] * len(self) if len(tensor) == len(self) else grids.prod(1).tolist()
            if sum(self.image_rows.setdefault(key, own)) != len(tensor):
                raise ValueError(f"{key} has {len(tensor)} entries: image_rows must add up to it")

    def __len__(self) -> int:
        return len(self.input_ids)

    def token_tensors(self) -> dict[str, Tensor]:
        shape = self.input_ids.shape
        return {k: v for k, v in self.extra_model_kwargs.items() if v.shape == shape}

    def image_tensors(self) -> dict[str, Tensor]:
        every = {"pixel_values": self.pixel_values, **self.extra_model_kwargs}
        return {k: v for k, v in every.items() if v is not None and k not in self.token_tensors()}

    def images_of(self, prompts: list[int]) -> dict[str, Tensor]:
        """The image tensors of these prompts, in this order; none where they have no images."""
        pieces = {k: v.split(self.image_rows[k]) for k, v in self.image_tensors().items()}
        found = {k: torch.cat([v[p] for p in prompts]) for k, v in pieces.items() if prompts}
        return {k: v for k, v in found.items() if len(v)}

    def shown(self) -> list[int]:
        """Of every row, in order: its prompt's entry of image_rows, and its own."""
        return [i for p, own in zip(self.prompt_index.tolist(), self.own) for i in (p, *own)]

    def cut_at(self, token_ids: list[int]) -> "MultimodalBatch":
        """End completions before these: a model looks for the image of a sampled placeholder."""
        bad = torch.isin(self.input_ids, torch.tensor(token_ids)) * self.loss_mask
        return replace(self, **{k: getattr(self, k) * (bad.cumsum(1) == 0) for k in PER_TOKEN})

    def select(self, rows: list[int]) -> "MultimodalBatch":
        """The given rows, trimmed to their longest, with the images of their prompts alone."""
        prompts, prompt_index = self.prompt_index[rows].unique(return_inverse=True)
        shown, own = prompts.tolist(), []
        for row in rows.tolist() if isinstance(rows, Tensor) else rows:
            own.append([*range(len(shown), len(shown) + len(self.own[row]))])
            shown += self.own[row]
        images, width = self.images_of(shown), self.attention_mask[rows].sum(1).max()
        tokens = {key: tensor[rows, :width] for key, tensor in self.token_tensors().items()}
        return MultimodalBatch(
            **{name: getattr(self, name)[rows, :width] for name in PER_TOKEN},
            rewards=self.rewards[rows], prompt_index=prompt_index,
            advantages=None if self.advantages is None else self.advantages[rows],
            image_rows={k: [self.image_rows[k][p] for p in shown] for k in images}, own=own,
            pixel_values=images.pop("pixel_values", None), extra_model_kwargs=tokens | images)

    def micro_batches(self, size: int, ranks: int = 1) -> list["MultimodalBatch"]:
        """At most `size` completions each, prompt by prompt, alike in length; no rank without.

        Of rows with gradient (a token in the loss, advantage not 0) or, to have metrics, a few.
        """
        lengths, prompts = self.attention_mask.sum(1), self.prompt_index
        longest = ((prompts[:, None] == prompts) * lengths).amax(1)  # of the prompt
        keys = torch.stack([-longest, prompts, -lengths], 1).tolist()
        trained = self.loss_mask.any(1)
        alive = (trained & (self.advantages != 0)).nonzero()[:, 0].tolist()
        rows = sorted(alive or trained.nonzero()[:size, 0].tolist(), key=keys.__getitem__)
        size = max(1, min(size, math.ceil(len(rows) / ranks)))
        return [self.select(rows[i:i + size]) for i in range(0, len(rows), size)]

    def to(self, device) -> "MultimodalBatch":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        extra = {k: v.to(device) for k, v in self.extra_model_kwargs.items()}
        return replace(self, **moved, extra_model_kwargs=extra)

    def sharing_pays(self, hidden_size: int) -> bool:
        """Whether forwarding each prompt once is clearly less work, padding included."""
        prompts, _, trained = self.fork()
        (P, W_p), (B, W_c), L = prompts["input_ids"].shape, trained.shape, self.input_ids.shape[1]
        pair = 1 / (6 * hidden_size)  # in a layer: 4 H flops in attention to a token's 24 H^2
        patches = torch.tensor(self.image_rows.get("pixel_values", [0] * B))  # as much as a token
        once = P * W_p * (1 + W_p * pair) + B * W_c * (1 + (W_p + W_c) * pair) + patches.sum()
        alone = B * L * (1 + L * pair) + patches[self.prompt_index].sum() + patches[P:].sum()
        return bool(once < 0.9 * alone)

    def fork(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Model inputs (P, W_p) of the prompts and (b, W_c) of the completions; what is trained.

        >>> ids = torch.tensor([[7, 8, 1, 2, 3], [7, 8, 4, 0, 0], [9, 5, 6, 0, 0]])
        >>> loss_mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]])
        >>> batch = MultimodalBatch(ids, ids.sign(), loss_mask, torch.zeros(3, 5), torch.zeros(3),
        ...                         prompt_index=torch.tensor([0, 0, 1]))
        >>> prompts, completions, trained = batch.fork()
        >>> prompts["input_ids"].tolist(), completions["input_ids"].tolist()
        ([[7, 8], [0, 9]], [[1, 2, 3], [4, 0, 0], [5, 6, 0]])
        """
        tokens = {"input_ids": self.input_ids, "attention_mask": self.attention_mask,
                  **self.token_tensors()}
        index, ends = self.prompt_index.tolist(), self.attention_mask.sum(1).tolist()
        starts = (self.attention_mask * (self.loss_mask.cumsum(1) == 0)).sum(1).tolist()
        first = [index.index(prompt) for prompt in range(max(index) + 1)]  # row of each prompt
        prompts = {key: pad_sequence([tensor[row, :starts[row]] for row in first], True, 0, "left")
                   for key, tensor in tokens.items()}
        tokens["loss_mask"], spans = self.loss_mask, [*map(slice, starts, ends)]
        completions = {key: pad_sequence([row[span] for row, span in zip(tensor, spans)], True)
                       for key, tensor in tokens.items()}
        return prompts, completions, completions.pop("loss_mask").bool()

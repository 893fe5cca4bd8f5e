"""The mathematics of masked GRPO (DeepSeekMath, arXiv 2402.03300), as pure functions of tensors.

Where it departs from the paper, and why:
- Advantages are not divided by the standard deviation of their group unless asked for, because
  that weighs prompts by how alike their rewards are (Dr. GRPO, arXiv 2503.20783).
- The loss is a mean over all tokens of the optimizer step. A mean per completion would favour long
  wrong answers (DAPO, arXiv 2503.14476, from which the two separate clip bounds come, too).
- The importance ratio is taken against the logprobs that the server recorded while it sampled.
  Tokens whose ratio leaves the mask bounds are left out of the loss: there the two policies differ
  by more than a ratio can correct.
- There is no reference model and no KL penalty.
"""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def group_advantages(rewards: Tensor, groups: Tensor, divide_by_std: bool = False) -> Tensor:
    """How much better each completion did than the other completions of its prompt.

        A_i = r_i - mean(r)    or    (r_i - mean(r)) / std(r)    over the group of i

    rewards and groups are (B,), of any type of number. The completions with the same number in
    groups form a group. Returns (B,) advantages, exactly 0 where all rewards of a group are equal.
    """
    if not rewards.is_floating_point():
        rewards = rewards.float()  # the mean of integers is none
    advantages = torch.zeros_like(rewards)
    for group in groups.unique():
        members = groups == group
        r = rewards[members]
        if (r == r[0]).all():
            continue  # r - r.mean() would leave a rounding error, and the group would be forwarded
        spread = 1.0
        if divide_by_std:
            spread = r.std(correction=0) + 1e-4
        advantages[members] = (r - r.mean()) / spread
    return advantages


def token_logprobs(hidden: Tensor, targets: Tensor, head, temperature: float,
                   banned: list[int] = (), max_logits: int | None = None, scale: float = 1.0,
                   cap: float | None = None) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of p = softmax(logits / temperature), fp32, both (N,).

    hidden is (N, H): the states that predict the targets (N,). head maps (n, H) to (n, V); logits
    are scale * head(hidden), or with a cap cap * tanh(scale * head(hidden) / cap). The banned token
    ids get -100 on their logit, as they do in the sampling request. Of the (N, V) logits at most
    max_logits are worked on at a time: see LinearLogprobs.
    """
    softmax = TokenSoftmax(temperature, list(banned), scale, cap)
    room = max_logits or room_for_logits(hidden.device)
    if type(head) is torch.nn.Linear:
        columns = max(1, room // max(1, len(hidden)))
        if columns > 128:
            columns -= columns % 128  # multiples suit a GPU's tensor cores
        return LinearLogprobs.apply(hidden, head.weight, head.bias, targets, softmax, columns)
    # The parameters of any other head are known to autograd alone: it runs row by row, and once more
    # in the backward pass.
    rows = max(1, room // getattr(head, "out_features", 2**18))
    found = [checkpoint(softmax.logprobs, head, states, ids, use_reentrant=False)
             for states, ids in zip(hidden.split(rows), targets.split(rows), strict=True)]
    logprobs, entropies = (torch.cat(parts) for parts in zip(*found))
    return logprobs, entropies


def room_for_logits(device: torch.device) -> int:
    """How many logits are held at a time: 64 MB of them, or of a GPU's memory one part in 256."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // (256 * 4)
    return 2**24


@dataclass
class TokenSoftmax:
    """What becomes of a head's output x; see token_logprobs."""
    temperature: float
    banned: list[int]
    scale: float
    cap: float | None

    def logprobs(self, head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """token_logprobs of n positions, with all of their (n, V) logits at once."""
        x = head(hidden).float() * 1  # a new tensor
        logits, _ = self.logits(x, slice(0, x.shape[1]))
        logprobs = logits.log_softmax(-1)                                # (n, V)
        with torch.no_grad():  # the entropy is a metric: H = -sum_v p_v log p_v, 0 where p_v is 0
            entropies = torch.special.entr(logprobs.exp()).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropies

    def logits(self, x: Tensor, block: slice) -> tuple[Tensor, float | Tensor]:
        """(n, v) fp32 logits over the temperature, in place, and their derivatives by x.

        x is the head's output for the token ids of the block.
        """
        slope = self.scale / self.temperature
        logits = x if slope == 1 else x.mul_(slope)
        if self.cap:
            cap = self.cap / self.temperature
            bounded = torch.tanh(logits / cap)
            logits, slope = cap * bounded, slope * (1 - bounded**2)
        banned = [i - block.start for i in self.banned if block.start <= i < block.stop]
        logits[:, banned] -= 100 / self.temperature
        return logits, slope


class LinearLogprobs(torch.autograd.Function):
    """TokenSoftmax of a linear layer, whose logits exist for one block of the vocabulary at a time.

        d log p(target) / d logits = onehot(target) - p

    Sums over the vocabulary are corrected whenever a larger logit comes (arXiv 1805.02867). The
    backward pass knows them, and gets each row of the weight's gradient by one product over all
    tokens. It computes logits again, but for a part of the blocks, which are kept: memory for time.
    Memory is taken once for all blocks: most of the time would go into new pages of it.
    """
    KEPT = 0.3  # of the blocks, or the only one

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                softmax: TokenSoftmax, columns: int) -> tuple[Tensor, Tensor]:
        device, dtype = hidden.device.type, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # In the type of the products, once and not for every block.
        states, weight = hidden.to(dtype), weight.to(dtype)              # (N, H), (V, H)
        if bias is not None:
            bias = bias.to(dtype)                                        # (V,)
        N, V = len(states), len(weight)
        ctx.softmax, ctx.kept = softmax, []
        ctx.blocks = [slice(i, min(i + columns, V)) for i in range(0, V, columns)]
        room = states.new_empty(N * min(columns, V))
        spare = torch.empty_like(room, dtype=torch.float32)
        largest = spare.new_full((N,), -1e30)
        total, weighted, of_target = spare.new_zeros(3, N)               # of p, of p * logits
        for number, block in enumerate(ctx.blocks):
            x = linear_into(room, states, weight, bias, block)           # (N, v)
            if number < max(1, LinearLogprobs.KEPT * len(ctx.blocks)):
                ctx.kept.append(x.clone())
            logits, _ = softmax.logits(x.float(), block)
            rows, ids = inside(targets, block)
            of_target[rows] = logits[rows, ids]
            before, largest = largest, torch.maximum(largest, logits.amax(-1))
            logits -= largest[:, None]
            p = torch.exp(logits, out=spare[:logits.numel()].view_as(logits))
            shrink = (before - largest).exp()
            weighted = shrink * (weighted + total * (before - largest))
            total = shrink * total + p.sum(-1)
            weighted += p.mul_(logits.clamp_(min=-1e30)).sum(-1)  # where 0 log 0 is 0
        logprobs = of_target - largest - total.log()
        # H = -sum_v p_v log p_v
        entropies = (total.log() - weighted / total).clamp_(min=0)
        ctx.save_for_backward(states, weight, bias, targets, largest + total.log())
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _):
        states, weight, bias, targets, log_z = ctx.saved_tensors
        of_states = torch.zeros_like(states, dtype=torch.float32)        # (N, H)
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.empty_like(bias) if bias is not None else None
        room = torch.empty_like(ctx.kept[0]).view(-1)  # the first block is as wide as any
        for number, block in enumerate(ctx.blocks):
            if number < len(ctx.kept):
                x = room[:ctx.kept[number].numel()].view_as(ctx.kept[number])
                x.copy_(ctx.kept[number])
            else:
                x = linear_into(room, states, weight, bias, block)
            logits, slope = ctx.softmax.logits(x.float(), block)
            p = logits.sub_(log_z[:, None]).exp_()                       # (N, v)
            rows, ids = inside(targets, block)
            p[rows, ids] -= 1
            of_x = p.mul_(-gradient[:, None] * slope).to(weight.dtype)
            if of_x.dtype == of_states.dtype:
                of_states.addmm_(of_x, weight[block])
            else:
                of_states += of_x @ weight[block]
            if of_weight is not None:
                torch.mm(of_x.T, states, out=of_weight[block])
            if of_bias is not None:
                of_bias[block] = of_x.sum(0, dtype=torch.float32)
        return of_states, of_weight, of_bias, None, None, None


def inside(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which of the targets are in the block, and their places in it."""
    rows = ((targets >= block.start) & (targets < block.stop)).nonzero()[:, 0]
    return rows, targets[rows] - block.start


def linear_into(room: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
                block: slice) -> Tensor:
    """(N, v) hidden @ weight.T + bias for this block of the vocabulary, in the memory of room."""
    weight = weight[block]
    x = room[:len(hidden) * len(weight)].view(len(hidden), len(weight))
    torch.mm(hidden, weight.T, out=x)
    if bias is not None:
        x += bias[block]
    return x


def grpo_loss(logprobs: Tensor, entropies: Tensor, behavior_logprobs: Tensor, advantages: Tensor,
              loss_mask: Tensor, num_tokens: float, *, mask_ratio_low: float,
              mask_ratio_high: float, clip_low: float,
              clip_high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """These rows' part of the loss of the optimizer step, and sums over their tokens for metrics.

        r_t    = exp(logprob_t - behavior_logprob_t)
        keep_t = loss_mask_t and mask_ratio_low <= r_t <= mask_ratio_high
        loss   = -1/N sum_t keep_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)

    All tensors are (b, L), but advantages is (b,). N is num_tokens, the number of loss-mask tokens
    in the whole optimizer step, so that the losses of its micro-batches add up. The keyword
    arguments are keys of the config by the same names: for a new one add a field there (and its
    name to MAY_BE_ZERO, if it may be 0).

    Each entry of the second result becomes a metric, divided by its entry "tokens". kl sums
    r - 1 - log r, Schulman's k3 estimator of KL(behavior || policy).
    """
    mask = loss_mask.bool()
    log_ratio = torch.where(mask, logprobs - behavior_logprobs, 0.0)
    log_ratio = log_ratio.clamp(-20, 20)  # far outside of the mask bounds, where exp() overflows
    ratio = log_ratio.exp()
    outside = (ratio < mask_ratio_low) | (ratio > mask_ratio_high)
    keep = mask & ~outside  # a NaN is not outside: it shows in the loss, instead of being left out

    plain = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages[:, None]
    objective = torch.where(keep, torch.minimum(plain, clipped), 0.0)
    loss = -objective.sum() / max(num_tokens, 1)

    per_token = {"tokens": mask, "ir": ratio * mask, "ent": entropies * mask,
                 "kl": log_ratio.expm1() - log_ratio, "masked_fraction": mask & ~keep,
                 "clip_fraction": keep & (clipped < plain)}
    return loss, {name: values.detach().sum() for name, values in per_token.items()}

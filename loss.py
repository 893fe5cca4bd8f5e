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
    max_logits exist at a time: the head runs chunk by chunk, and once more in the backward pass.
    """
    softmax = TokenSoftmax(temperature, list(banned), scale, cap)
    vocabulary = getattr(head, "out_features", 2**18)
    rows = max(1, (max_logits or room_for_logits(hidden.device)) // vocabulary)
    if type(head) is torch.nn.Linear:
        return LinearLogprobs.apply(hidden, head.weight, head.bias, targets, softmax, rows)
    # The parameters of any other head are known to autograd alone.
    found = [checkpoint(softmax.logprobs, head, states, ids, use_reentrant=False)
             for states, ids in zip(hidden.split(rows), targets.split(rows), strict=True)]
    logprobs, entropies = (torch.cat(parts) for parts in zip(*found))
    return logprobs, entropies


def room_for_logits(device: torch.device) -> int:
    """How many logits are held at a time: 64 MB of them, or a sixty-fourth of a GPU's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // (64 * 4)
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
        logits, _ = self.logits(head(hidden).float() * 1)  # a new tensor
        logprobs = logits.log_softmax(-1)                                # (n, V)
        with torch.no_grad():  # the entropy is a metric: H = -sum_v p_v log p_v, 0 where p_v is 0
            entropies = torch.special.entr(logprobs.exp()).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropies

    def logits(self, x: Tensor) -> tuple[Tensor, float | Tensor]:
        """(n, V) fp32 logits over the temperature, in place, and their derivatives by x."""
        slope = self.scale / self.temperature
        logits = x.mul_(slope)
        if self.cap:
            cap = self.cap / self.temperature
            bounded = torch.tanh(logits / cap)
            logits, slope = cap * bounded, slope * (1 - bounded**2)
        logits[:, self.banned] -= 100 / self.temperature
        return logits, slope


class LinearLogprobs(torch.autograd.Function):
    """TokenSoftmax of a linear layer, whose logits are computed again to get their gradient.

        d log p(target) / d logits = onehot(target) - p

    The gradient of the weight is summed over all chunks in fp32: in bf16 every addition rounds, by
    more the larger the sum is, and with 512 chunks it would be 2 % off, instead of 0.3 %. Memory is
    taken once for all chunks: most of the time would go into new pages of it.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                softmax: TokenSoftmax, rows: int) -> tuple[Tensor, Tensor]:
        device, dtype = hidden.device.type, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # In the type of the products, once and not for every chunk.
        states, weight = hidden.to(dtype), weight.to(dtype)              # (N, H), (V, H)
        if bias is not None:
            bias = bias.to(dtype)                                        # (V,)
        ctx.softmax, ctx.rows = softmax, min(rows, len(states))
        room = states.new_empty(ctx.rows, len(weight))
        spare = torch.empty_like(room, dtype=torch.float32)
        logprobs, entropies, log_z = spare.new_empty(3, len(states))     # (N,) each
        for start in range(0, len(states), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logits, _ = softmax.logits(linear_into(room, states[chunk], weight, bias))  # (n, V)
            largest = logits.amax(-1)                                    # (n,)
            logits -= largest[:, None]
            p = torch.exp(logits, out=spare[:len(logits)])               # (n, V), times their sum
            total = p.sum(-1)
            log_z[chunk] = largest + total.log()
            logprobs[chunk] = logits.gather(1, targets[chunk, None])[:, 0] - total.log()
            # H = -sum_v p_v log p_v, where 0 log 0 is 0
            entropies[chunk] = total.log() - p.mul_(logits.clamp_(min=-1e30)).sum(-1) / total
        ctx.save_for_backward(states, weight, bias, targets, log_z)
        entropies.clamp_(min=0)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _):
        states, weight, bias, targets, log_z = ctx.saved_tensors
        of_states, of_weight, of_bias = torch.empty_like(states), None, None
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight, dtype=torch.float32)
        if bias is not None:
            of_bias = torch.zeros_like(bias, dtype=torch.float32)
        room = states.new_empty(ctx.rows, len(weight))
        for start in range(0, len(states), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            h = states[chunk]                                            # (n, H)
            logits, slope = ctx.softmax.logits(linear_into(room, h, weight, bias))
            of_x = logits.sub_(log_z[chunk, None]).exp_().neg_()         # (n, V): -p
            of_x[range(len(h)), targets[chunk]] += 1
            of_x *= gradient[chunk, None] * slope
            of_x = of_x.to(weight.dtype)
            torch.mm(of_x, weight, out=of_states[chunk])
            if of_weight is not None and of_x.dtype == of_weight.dtype:
                of_weight.addmm_(of_x.T, h)
            elif of_weight is not None:
                of_weight += of_x.T @ h
            if of_bias is not None:
                of_bias += of_x.sum(0, dtype=torch.float32)
        return of_states, of_weight, of_bias, None, None, None


def linear_into(room: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, V) hidden @ weight.T + bias, in the first n rows of room; fp32."""
    x = torch.mm(hidden, weight.T, out=room[:len(hidden)])
    if bias is not None:
        x += bias
    return x.float()


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

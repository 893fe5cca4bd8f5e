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
import torch
from torch import Tensor
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
                   banned: list[int] = (), max_logits: int = 2**24, scale: float = 1.0,
                   cap: float | None = None) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of p = softmax(logits / temperature), fp32, both (N,).

    hidden is (N, H): the states that predict the targets (N,). head maps (n, H) to (n, V); logits
    are scale * head(hidden), or with a cap cap * tanh(scale * head(hidden) / cap). The banned token
    ids get -100 on their logit, as they do in the sampling request. Of the (N, V) logits at most
    max_logits exist at a time: the head runs chunk by chunk, and once more in the backward pass.
    """
    head = exact_head(head)
    vocabulary = getattr(head, "out_features", 2**18)
    rows = max(1, max_logits // vocabulary)
    logprobs, entropies = [], []
    for states, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
        chunk = checkpoint(chunk_logprobs, states, ids, head, temperature, list(banned), scale, cap,
                           use_reentrant=False)
        logprobs.append(chunk[0])
        entropies.append(chunk[1])
    return torch.cat(logprobs), torch.cat(entropies)


def chunk_logprobs(hidden: Tensor, targets: Tensor, head, temperature: float,
                   banned: list[int], scale: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """token_logprobs of n positions, with all of their (n, V) logits at once."""
    logits = head(hidden).float() / (temperature / scale)          # (n, V), a new tensor
    if cap:
        cap = cap / temperature
        logits = cap * torch.tanh(logits / cap)
    logits[:, banned] -= 100 / temperature
    log_z = logits.logsumexp(-1)                         # (n,)
    with torch.no_grad():  # the entropy is a metric: H = -sum_v p_v log p_v, 0 where p_v is 0
        p = (logits - log_z[:, None]).exp_().clamp_(max=1)           # (n, V)
        entropies = torch.special.entr(p, out=p).sum(-1)             # (n,)
    chosen = logits.gather(1, targets[:, None])[:, 0]    # (n,)
    return chosen - log_z, entropies


class InLowPrecision(torch.autograd.Function):
    """A weight as it is computed with, bf16 for example, whose gradient goes on in fp32."""

    @staticmethod
    def forward(ctx, weight: Tensor, low: Tensor) -> Tensor:
        return low.view_as(low)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.float(), None


def exact_head(head):
    """The head, but the gradients of its weights from all chunks add up in fp32.

    In bf16 every addition rounds, by more the larger the sum is: with 512 chunks the gradient would
    be 2 % off, instead of 0.3 % with one. Heads other than plain linear layers stay as they are.
    """
    if type(head) is not torch.nn.Linear:
        return head
    device, dtype = head.weight.device.type, head.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype not in (torch.bfloat16, torch.float16):
        return head
    low = {name: weight.detach().to(dtype) for name, weight in head.named_parameters()}
    sums = {name: weight.float() for name, weight in head.named_parameters()}

    def forward(hidden: Tensor) -> Tensor:
        weights = {name: InLowPrecision.apply(sums[name], low[name]) for name in low}
        return torch.func.functional_call(head, weights, (hidden,))

    forward.out_features = head.out_features
    return forward


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

"""The mathematics of masked GRPO (DeepSeekMath, arXiv 2402.03300): pure functions of tensors.

Departures, and why. Advantages are not divided by the group's standard deviation unless asked for:
that weighs prompts by how alike their rewards are (Dr. GRPO, arXiv 2503.20783). The loss is a mean
over the step's tokens: one per completion would favour long wrong answers (DAPO, arXiv 2503.14476,
as the two clip bounds). The ratio is taken against the logprobs recorded in sampling; tokens whose
ratio leaves the mask bounds are left out, for there the two policies differ by more than a
correction can mend. There is no reference model and no KL penalty.
"""
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def group_advantages(rewards: Tensor, groups: Tensor, divide_by_std: bool = False) -> Tensor:
    """A_i = r_i - mean(r), optionally over std(r), of the group: all with its groups[i]; (B,)."""
    advantages = torch.zeros_like(rewards)
    for group in groups.unique():
        r = rewards[mine := groups == group]
        if (r != r[0]).any():  # else exactly 0, in spite of rounding
            spread = r.std(correction=0) + 1e-4 if divide_by_std else 1
            advantages[mine] = (r - r.mean()) / spread
    return advantages


def token_logprobs(hidden: Tensor, targets: Tensor, head, temperature: float,
                   banned: list[int] = (), max_logits: int = 2**24) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of p = softmax(head(hidden) / temperature), fp32, both (N,).

    hidden: (N, H) states that predict the targets (N,); head: (n, H) -> (n, V). banned ids get
    -100 on their logit, as in the sampling request. At most max_logits logits exist at a time: the
    head runs by chunks, and again in the backward pass. The entropy is a metric, without gradient.
    """
    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float()  # (n, V)
        logits[:, list(banned)] -= 100
        logits = logits / temperature
        log_z = logits.logsumexp(-1)
        with torch.no_grad():  # H = log Z - sum_v p_v logit_v
            entropies = log_z - (logits - log_z[:, None]).exp_().mul_(logits).sum(-1)
        return logits.gather(1, targets[:, None])[:, 0] - log_z, entropies

    rows = max(1, max_logits // getattr(head, "out_features", 2**18))
    parts = [checkpoint(chunk, *inputs, use_reentrant=False)
             for inputs in zip(hidden.split(rows), targets.split(rows), strict=True)]
    return tuple(map(torch.cat, zip(*parts)))


def grpo_loss(logprobs: Tensor, entropies: Tensor, behavior_logprobs: Tensor, advantages: Tensor,
              loss_mask: Tensor, num_tokens: float, *, mask_ratio_low: float = 0.1,
              mask_ratio_high: float = 10.0, clip_low: float = 0.2,
              clip_high: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of these rows in the step's loss, and the sums behind its metrics.

        r_t    = exp(logprob_t - behavior_logprob_t)
        keep_t = loss_mask_t and mask_ratio_low <= r_t <= mask_ratio_high
        loss   = -1/N sum_t keep_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)

    All (b, L) but advantages (b,). N is num_tokens, the loss-mask tokens of the whole step, so
    that its micro-batches add up. kl sums r - 1 - log r, Schulman's k3 for KL(behavior || policy).
    """
    mask = loss_mask.bool()
    log_ratio = torch.where(mask, logprobs - behavior_logprobs, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()  # was clamped outside of any mask, where fp32 overflows
    keep = mask & (ratio >= mask_ratio_low) & (ratio <= mask_ratio_high)
    plain = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages[:, None]
    loss = -torch.where(keep, torch.minimum(plain, clipped), 0.0).sum() / max(num_tokens, 1)
    sums = {"tokens": mask, "ir": ratio * mask, "ent": entropies * mask,
            "kl": log_ratio.expm1() - log_ratio, "masked_fraction": mask & ~keep,
            "clip_fraction": keep & (clipped < plain)}
    return loss, {name: values.detach().sum() for name, values in sums.items()}

"""The mathematics of masked GRPO: pure functions of tensors.

GRPO is from DeepSeekMath (arXiv 2402.03300). Departures, and why:
- advantages are not divided by the group's standard deviation unless asked for, which would
  weigh easy and hard prompts up (Dr. GRPO, arXiv 2503.20783);
- the loss is averaged over all tokens of the step, not per completion, so that long wrong
  answers are not favoured (DAPO, arXiv 2503.14476; likewise the two clip bounds);
- the ratio is taken against the logprobs that the server recorded while sampling, and a token
  whose ratio leaves [mask_low, mask_high] is left out: there the two policies disagree by more
  than an off-policy correction can mend. There is no reference model and no KL penalty.
"""
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOG_RATIO = 20.0  # exp(20) is far outside any mask; beyond it fp32 would overflow


def group_advantages(rewards: Tensor, groups: Tensor, divide_by_std: bool = False) -> Tensor:
    """A_i = r_i - mean(rewards of i's group), optionally over the group's std. All (B,).

    groups: (B,) any integers; equal ones are one group.
    """
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(count)).index_add_(0, index, rewards) / count
    # a group of equal rewards must give exactly 0, which r - mean(r) in fp32 need not
    highest = torch.full((len(count),), -torch.inf).scatter_reduce_(0, index, rewards, "amax")
    lowest = torch.full((len(count),), torch.inf).scatter_reduce_(0, index, rewards, "amin")
    advantages = torch.where((highest > lowest)[index], rewards - mean[index], 0.0)
    if divide_by_std:
        variance = torch.zeros(len(count)).index_add_(0, index, advantages.square()) / count
        advantages = advantages / (variance.sqrt()[index] + 1e-4)
    return advantages


def token_logprobs(hidden: Tensor, targets: Tensor, head, temperature: float,
                   banned: list[int] = (), max_logits: int = 2**24) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of p = softmax(head(hidden) / temperature), fp32, both (N,).

    hidden: (N, H) states that predict the targets (N,); head: the LM head, a callable to (., V).
    banned ids get -100 on their logit, the same as the logit_bias of the sampling request.
    At most max_logits logits exist at a time: the head runs chunk by chunk and once more in the
    backward pass. The entropy is a metric and carries no gradient.
    """
    banned = torch.tensor(banned, dtype=torch.long, device=hidden.device)

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float()  # (n, V)
        logits = logits.index_add(1, banned, logits.new_full((len(logits), len(banned)), -100.0))
        logits = logits / temperature
        log_z = logits.logsumexp(-1)
        logprobs = logits.gather(1, targets[:, None])[:, 0] - log_z
        with torch.no_grad():  # H = log Z - sum_v p_v logit_v
            entropies = log_z - (logits - log_z[:, None]).exp_().mul_(logits).sum(-1)
        return logprobs, entropies

    if not len(targets):
        return hidden.sum(-1).float(), torch.zeros(0, device=hidden.device)
    vocabulary = head.weight.shape[0] if hasattr(head, "weight") else 2**18
    rows = max(1, max_logits // vocabulary)
    results = [checkpoint(chunk, h, t, use_reentrant=False)
               for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)]
    logprobs, entropies = zip(*results)
    return torch.cat(logprobs), torch.cat(entropies)


def grpo_loss(logprobs: Tensor, behavior_logprobs: Tensor, entropies: Tensor, advantages: Tensor,
              loss_mask: Tensor, num_tokens: float, *, mask_ratio_low: float = 0.1,
              mask_ratio_high: float = 10.0, clip_low: float = 0.2,
              clip_high: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of these rows in the step's loss, and the sums behind its metrics.

        r_t    = exp(logprob_t - behavior_logprob_t)
        keep_t = loss_mask_t and mask_ratio_low <= r_t <= mask_ratio_high
        loss   = -1/N sum_t keep_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)

    All (b, L) but advantages (b,). num_tokens is N, the loss-mask tokens of the whole step, so
    the losses of its micro-batches add up to the loss of the full batch. An empty mask gives 0.
    Sums: ir (r), ent, kl (r - 1 - log r >= 0, Schulman's k3 estimate of
    KL(behavior || policy), joschu.net/blog/kl-approx.html), masked and clipped tokens, tokens.
    """
    mask = loss_mask.bool()
    log_ratio = torch.where(mask, logprobs - behavior_logprobs, 0.0)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    keep = mask & (ratio >= mask_ratio_low) & (ratio <= mask_ratio_high)
    advantage = advantages[:, None]  # (b, 1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    objective = torch.where(keep, torch.minimum(ratio * advantage, clipped), 0.0)  # (b, L)
    loss = -objective.sum() / max(num_tokens, 1)
    with torch.no_grad():
        sums = {
            "ir": torch.where(mask, ratio, 0.0).sum(),
            "ent": torch.where(mask, entropies, 0.0).sum(),
            "kl": (log_ratio.expm1() - log_ratio).sum(),
            "masked": (mask & ~keep).sum(),
            "clipped": (keep & (clipped < ratio * advantage)).sum(),
            "tokens": mask.sum(),
        }
    return loss, sums

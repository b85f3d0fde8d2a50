"""The formulas that the algorithms share. Tests compare them with published numbers.

Totals, counts and metrics are later summed over micro-batches and over data- and context-parallel ranks. To make these
sums independent of the split, each unit counts on exactly one rank. A token counts on the rank that holds it. A
sequence or a pair counts on its owner (Batch.owned).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from rlhf.config import Between, Config
from rlhf.contracts import Batch, Loss, Sample, Total, alone
from rlhf.errors import UserError
from rlhf.lazy import F, np, torch

if TYPE_CHECKING:
    from torch import Tensor

MismatchCap = Annotated[float, Between(-1)]
MismatchMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]


def mean_loss(per_token: Tensor, batch: Batch, unit: str = "token", length: int = 0, **metrics: Tensor) -> Loss:
    """Return the mean of per_token [T] over the global batch.

    unit "token": the mean over all learned tokens. "sequence": the mean over responses of each response's token mean.
    "constant": the mean over responses of each response's token sum divided by `length`, which is the same for all.
    A response without learned tokens does not count. metrics [T] are averaged over tokens in all cases.
    """
    tokens = batch.mask.sum()
    weight, count = batch.mask, tokens
    if unit == "sequence":
        weight, count = batch.mask / spread(batch.seq_sum(batch.mask), batch).clamp(min=1.0), batch.last.sum()
    elif unit == "constant":
        weight, count = batch.mask / length, batch.last.sum()
    total = (per_token * weight).sum()
    means = {name: ((value.detach() * batch.mask).sum(), tokens) for name, value in metrics.items()}
    return Loss(total, count, {"loss": (total.detach(), count), **means})


def pair_loss(per_pair: Tensor, chosen: Tensor, batch: Batch, **metrics: Tensor) -> Loss:
    """Return the mean of per_pair [pairs] and of metrics [pairs] over all pairs of the global batch.

    chosen [pairs] is the index of each pair's better sequence. The owner of that sequence counts the pair.
    """
    weight = batch.owned()[chosen]
    count, total = weight.sum(), (per_pair * weight).sum()
    means = {name: ((value.detach() * weight).sum(), count) for name, value in metrics.items()}
    return Loss(total, count, {"loss": (total.detach(), count), **means})


def wins(margin: Tensor) -> Tensor:
    """Return 1.0 where the margin is positive and 0.5 where it is exactly 0.

    So a model that gives all responses the same score has an accuracy of one half.
    """
    return torch.heaviside(margin.detach(), margin.new_full((), 0.5))


def spread(x: Tensor, batch: Batch) -> Tensor:
    """Return [T]: the value x [S] of each token's sequence, and 0 for padding."""
    return F.pad(x, (0, 1))[batch.segment]


def seq_mean(x: Tensor, batch: Batch) -> Tensor:
    """Return the mean of x [T] over each sequence's learned tokens [S]; 0 for a sequence without learned tokens."""
    return batch.seq_sum(x) / batch.seq_sum(torch.ones_like(batch.mask)).clamp(min=1.0)


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic surrogate (1707.06347, eq. 7): -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log_ratio).

    Return the loss [T], and 1.0 where the clipped branch was taken [T]. There is no second clip for negative advantages
    ("dual clip").
    """
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(plain, clipped), (clipped < plain).float()


def clipped_weight(
    logp: Tensor, log_ratio: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """CISPO (2506.13585, eq. 4): -sg(clip(r, 1 - low, 1 + high)) A logp. Each token has a gradient of bounded weight.

    Return the loss [T], and 1.0 where the weight was clipped [T]. low = 1 gives the paper's loss, which has no lower
    bound.
    """
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - low, 1 + high)
    return -weight * advantages * logp, (weight != ratio).float()


def mismatch_limits(
    config: Config, section: str, mode: str, floor: float, cap: float
) -> tuple[str, float, float] | None:
    """Return mode, floor and cap of sampler_weight() from the mismatch keys of a section; None: there is no weight.

    A negative cap is 2 if steps learn from tokens of older weights (rollout.inflight > 1), else 0. Raises
    UserError if the keys contradict each other, or if the engine's log-probs are those of a filtered distribution. The
    ratio of an unfiltered policy to it would be too small by the probability of all tokens that the filter removes.
    """
    r = config.rollout
    cap = cap if cap >= 0 else 2.0 if r.inflight > 1 else 0.0
    given = f"{section}.mismatch_cap={cap:g}"
    if not cap and (floor or mode != "token_truncate"):
        raise UserError(
            f"{section}.mismatch_mode={mode} and mismatch_floor={floor:g} need a cap, but {given}: raise it"
        )
    if cap and floor > cap:
        raise UserError(f"{section}.mismatch_floor={floor:g} is above {given}: lower it")
    if cap and r.filters:
        what = f"rollout.top_p={r.top_p:g} and rollout.top_k={r.top_k} filter the sampler's distribution"
        remedy = f"set top_p=1 and top_k=0, or {section}.mismatch_cap=0"
        raise UserError(f"{given} compares the policy with the sampler, but {what}: {remedy}")
    return (mode, floor, cap) if cap else None


def sampler_weight(
    old: Tensor, sampler: Tensor, batch: Batch, mode: str, floor: float, cap: float
) -> tuple[Tensor, Tensor]:
    """Return the importance weight of each token [T], and 1.0 where a ratio is not in [floor, cap] [T].

    The ratio is that of the policy before the update to the distribution that sampled the tokens, exp(old - sampler).
    The two differ by the engine's rounding, or because older weights sampled the token. Modes:
      token_truncate     the token's ratio, clipped to [floor, cap]
      token_mask         the token's ratio, or 0 if it is not in [floor, cap] (IcePop, 2510.18855)
      sequence_truncate  the product of the ratios of the response, clipped
      sequence_mask      this product, or 0 if it is not in [floor, cap]
      geometric_mask     the token's ratio, or 0 if the geometric mean of the response is not in [floor, cap]
    The first four are modes of TRL. The last is seq-mask-tis of NeMo RL and OpenRLHF. Callers multiply the surrogate by
    the weight, but not a KL term, as these and verl do. Tokens of weight 0 still count in the mean. token_truncate with
    a ratio to the old policy is a truncated decoupled PPO (2505.24298, eq. 5).
    """
    log_ratio = (old - sampler) * batch.mask
    unit, _, action = mode.partition("_")
    weight = judged = log_ratio.exp()
    if unit == "sequence":
        weight = judged = spread(batch.seq_sum(log_ratio), batch).exp()
    elif unit == "geometric":
        judged = spread(seq_mean(log_ratio, batch), batch).exp()
    outside = (judged < floor) | (judged > cap)
    weight = weight.clamp(floor, cap) if action == "truncate" else weight.masked_fill(outside, 0.0)
    return weight, outside.float()


def clipped_value(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return the clipped value loss of openai/baselines ppo2 [T], and 1.0 where the clipped error was larger [T].

    The loss is half the larger of two squared errors: of the value, and of the value clipped to within `clip` of the
    old value. So a value that moves further than `clip` does not lower the loss. clip=0 uses the unclipped error alone.
    """
    error = (values - returns) ** 2
    held = (old + (values - old).clamp(-clip, clip) - returns) ** 2 if clip else error
    return 0.5 * torch.maximum(error, held), ((held > error) & ((values - old).abs() > clip)).float()


def kl_estimate(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return Schulman's estimate of KL(policy || reference) for tokens that the policy sampled [T].

    With d = ref_logp - logp, the estimates are k1 = -d, k2 = d^2 / 2 and k3 = e^d - 1 - d. k1 and k3 are unbiased. k2
    and k3 are never negative. None is clamped. As a loss, k1 has an expected gradient of zero. k2 has the
    gradient of the KL. k3 has the gradient of KL(reference || policy).
    """
    d = ref_logp - logp
    if kind == "k1":
        return -d
    return d**2 / 2 if kind == "k2" else torch.expm1(d) - d


def preference(h: Tensor, kind: str, beta: float, smoothing: float = 0.0, margin: float = 0.0) -> Tensor:
    """Return the preference loss [pairs].

    h [pairs] is the log-prob (or log-ratio to the reference) of the chosen response minus that of the rejected
    response. sigmoid: -log sigmoid(z) (1 - smoothing) - log sigmoid(-z) smoothing with z = beta h - margin (2305.18290;
    cDPO; 2405.14734). ipo: (h - 1 / (2 beta))^2 (2310.12036, eq. 17). In the paper, h is a difference of summed
    log-ratios.
    """
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    z = beta * h - margin
    return -F.logsigmoid(z) * (1 - smoothing) - F.logsigmoid(-z) * smoothing


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the advantages [N] of generalised advantage estimation (1506.02438) for one response, and the returns [N].

    Returns are advantages + values. The value after the last token is 0, also for a response that the length limit
    ended.
    """
    following = np.append(values[1:], 0.0)
    deltas, backwards, running = rewards + gamma * following - values, [], 0.0
    for delta in deltas[::-1].tolist():  # the loop takes twice as long with numpy scalars
        running = delta + gamma * lam * running
        backwards.append(running)
    advantages = np.array(backwards[::-1])
    return advantages, advantages + values


def learned(samples: Sequence[Sample], stream: str) -> np.ndarray:
    """Return the values of a stream at all learned tokens of the samples as one array."""
    return np.concatenate([np.empty(0, np.float32), *(getattr(s, stream)[s.mask] for s in samples)])


def moments(values: np.ndarray, total: Total) -> tuple[float, float, float]:
    """Return the count, the mean, and the sum of squared deviations of the values of all replicas, in float64."""
    values = values.astype(np.float64)
    count, summed = total(np.array([len(values), values.sum()])).tolist()
    mean = summed / max(count, 1.0)
    return count, mean, float(total(((values - mean) ** 2).sum()))


def whiten(samples: Sequence[Sample], total: Total = alone) -> None:
    """Scale the advantages of all learned tokens of all replicas to mean 0 and population variance 1, in place.

    1e-8 is added to the variance before the division.
    """
    count, mean, squares = moments(learned(samples, "advantages"), total)
    deviation = np.sqrt(squares / max(count, 1.0) + 1e-8)
    for s in samples:
        s.advantages = np.where(s.mask, (s.advantages.astype(np.float64) - mean) / deviation, 0.0).astype(np.float32)


def running_deviation(state: dict[str, float], values: np.ndarray, total: Total = alone) -> float:
    """Return the population standard deviation of all values so far, including `values` of all replicas (Chan, 1979).

    state holds their count, mean and sum of squared deviations. The result is 0 if the values differ by no more than
    float32 rounding, because scores are float32. Dividing equal scores by such a deviation would make them very large.
    """
    count, mean, squares = (state.get(f"reward_{name}", 0.0) for name in ("count", "mean", "squares"))
    added, centre, own = moments(values, total)
    seen, shift = count + added, centre - mean
    squares += own + shift**2 * count * added / seen
    mean += shift * added / seen
    state |= {"reward_count": seen, "reward_mean": mean, "reward_squares": squares}
    deviation = (squares / seen) ** 0.5
    return deviation if deviation > 1e-6 * abs(mean) else 0.0


def repeats(tokens: np.ndarray, n: int) -> np.ndarray:
    """Return [N]: True at each token that completes an n-gram that also occurs earlier in tokens [N]."""
    seen, found = set(), np.zeros(len(tokens), bool)
    for end in range(n, len(tokens) + 1):
        gram = tuple(tokens[end - n : end].tolist())
        found[end - 1] = gram in seen
        seen.add(gram)
    return found

"""The formulas that the algorithms share, tested against published numbers.

Totals, counts and metrics are summed over micro-batches and over data- and context-parallel ranks. So each is a sum of parts that do not
depend on the split: tokens count on the rank that holds them, sequences and pairs on their owner's (Batch.owned).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.config import Config
from rlhf.contracts import Batch, Loss, Sample
from rlhf.lazy import F, np, torch

if TYPE_CHECKING:
    from torch import Tensor


def mean_loss(per_token: Tensor, batch: Batch, unit: str = "token", length: int = 0, **metrics: Tensor) -> Loss:
    """Mean of per_token [T] over the global batch: over learned tokens (unit "token"); over responses, of each one's own mean over its
    tokens ("sequence"); or over responses, of each one's sum divided by `length`, whatever its own ("constant").

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
    """Mean of per_pair [pairs] and of metrics [pairs] over the pairs of the global batch; chosen [pairs] is who owns them."""
    weight = batch.owned()[chosen]
    count, total = weight.sum(), (per_pair * weight).sum()
    means = {name: ((value.detach() * weight).sum(), count) for name, value in metrics.items()}
    return Loss(total, count, {"loss": (total.detach(), count), **means})


def wins(margin: Tensor) -> Tensor:
    """1.0 where the margin is positive, 0.5 where it is exactly 0: a model that cannot tell has an accuracy of one half."""
    return torch.heaviside(margin.detach(), margin.new_full((), 0.5))


def spread(x: Tensor, batch: Batch) -> Tensor:
    """x[S] to every token of its sequence, 0 to the padding -> [T]."""
    return F.pad(x, (0, 1))[batch.segment]


def seq_mean(x: Tensor, batch: Batch) -> Tensor:
    """Mean of x[T] over each sequence's learned tokens -> [S]; 0 without any."""
    return batch.seq_sum(x) / batch.seq_sum(torch.ones_like(batch.mask)).clamp(min=1.0)


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic surrogate (1707.06347, eq. 7): -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log_ratio).

    Returns the loss [T], and 1.0 where the clipped branch was taken [T]. No second clip of negative advantages ("dual clip").
    """
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(plain, clipped), (clipped < plain).float()


def clipped_weight(logp: Tensor, log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """CISPO (2506.13585, eq. 4): -sg(clip(r, 1 - low, 1 + high)) A logp: every token keeps its gradient, with a bounded weight.

    Returns the loss [T], and 1.0 where the weight was clipped [T]. The paper has no lower bound, which is low = 1.
    """
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - low, 1 + high)
    return -weight * advantages * logp, (weight != ratio).float()


def mismatch_cap(given: float, config: Config) -> float:
    """The cap of sampler_weight(): as given, or where that is below 0, 2 for steps that learn from what older weights drew, else 0: off."""
    if given >= 0:
        return given
    return 2.0 if config.rollout.inflight > 1 else 0.0


def sampler_weight(old: Tensor, sampler: Tensor, batch: Batch, cap: float) -> tuple[Tensor, Tensor]:
    """Truncated importance weight min(exp(old - sampler), cap) of the policy before the update over what drew each token [T]: another
    engine's rounding, or older weights. Returns it, and 1.0 where it was capped [T].

    It weighs the surrogate, not a KL, as verl's; with a ratio to the old policy this is decoupled PPO (2505.24298, eq. 5), truncated.
    """
    weight = ((old - sampler) * batch.mask).exp()
    return weight.clamp(max=cap), (weight > cap).float()


def clipped_value(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, the larger of two [T]: of the value, and of the value held within `clip` of the old one (0: of the value
    alone). So a value gains nothing from moving further (openai/baselines ppo2). With it, 1.0 where the second was larger [T].
    """
    error = (values - returns) ** 2
    held = (old + (values - old).clamp(-clip, clip) - returns) ** 2 if clip else error
    return 0.5 * torch.maximum(error, held), ((held > error) & ((values - old).abs() > clip)).float()


def kl_estimate(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's estimates of KL(policy || reference) for tokens of the policy [T], d = ref_logp - logp: k1 -d, k2 d^2 / 2, k3 e^d - 1 - d.

    k1 and k3 are unbiased, k2 and k3 never negative; none is clamped. As a loss, k1 has a gradient of zero on average, k2 the KL's,
    k3 that of KL(reference || policy).
    """
    d = ref_logp - logp
    if kind == "k1":
        return -d
    return d**2 / 2 if kind == "k2" else torch.expm1(d) - d


def preference(h: Tensor, kind: str, beta: float, smoothing: float = 0.0, margin: float = 0.0) -> Tensor:
    """Loss [pairs] of h, the chosen minus the rejected response's log-prob (or log-ratio to the reference).

    sigmoid: -log sigmoid(z) (1 - smoothing) - log sigmoid(-z) smoothing with z = beta h - margin (2305.18290; cDPO; 2405.14734).
    ipo: (h - 1 / (2 beta))^2 (2310.12036, eq. 17), of whatever h is; the paper's is of summed log-probs.
    """
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    z = beta * h - margin
    return -F.logsigmoid(z) * (1 - smoothing) - F.logsigmoid(-z) * smoothing


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (1506.02438) over one response -> advantages [N], returns [N] = advantages + values.

    The value after the last token is 0: the response ends there, whatever ended it.
    """
    following = np.append(values[1:], 0.0)
    deltas, backwards, running = rewards + gamma * following - values, [], 0.0
    for delta in deltas[::-1].tolist():  # numpy's own numbers take twice the time
        running = delta + gamma * lam * running
        backwards.append(running)
    advantages = np.array(backwards[::-1])
    return advantages, advantages + values


def whiten(samples: Sequence[Sample]) -> None:
    """Give the advantages of all learned tokens mean 0 and (population) variance 1, in place, with 1e-8 added to the variance."""
    if not samples:
        return
    flat = np.concatenate([s.advantages[s.mask] for s in samples]).astype(np.float64)
    mean, deviation = flat.mean(), np.sqrt(flat.var() + 1e-8)
    for s in samples:
        s.advantages = np.where(s.mask, (s.advantages - mean) / deviation, 0.0).astype(np.float32)


def running_deviation(state: dict[str, float], values: np.ndarray) -> float:
    """Population standard deviation of all values so far, these included; state keeps their count, mean and summed squares (Chan, 1979).

    0 where they differ by no more than rounding of float32, in which scores come: to divide by that would make enormous numbers of equals.
    """
    count, mean, squares = (state.get(f"reward_{name}", 0.0) for name in ("count", "mean", "squares"))
    total, shift = count + len(values), float(values.mean()) - mean
    squares += float(((values - values.mean()) ** 2).sum()) + shift**2 * count * len(values) / total
    mean += shift * len(values) / total
    state |= {"reward_count": total, "reward_mean": mean, "reward_squares": squares}
    deviation = (squares / total) ** 0.5
    return deviation if deviation > 1e-6 * abs(mean) else 0.0


def repeats(tokens: np.ndarray, n: int) -> np.ndarray:
    """True at each token that completes an n-gram which these tokens had before [N]."""
    seen, found = set(), np.zeros(len(tokens), bool)
    for end in range(n, len(tokens) + 1):
        gram = tuple(tokens[end - n : end].tolist())
        found[end - 1] = gram in seen
        seen.add(gram)
    return found

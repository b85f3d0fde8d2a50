"""Estimates the seconds of a step from measured rates. docs/sizing.md compares it with measured steps.

The rates are those of an H200, measured by benchmarks/ (results/h200.jsonl, NOTES.md). Those of a device of 80 GB are
scaled by the published numbers of an H100 SXM: the same peak of matrix products (989 TFLOP/s in bfloat16), and 3.35
instead of 4.8 TB/s of memory bandwidth. Not included: rewards, evaluation, saves, the network between nodes, further
rounds of a step (rollout.rounds), and long tails of response lengths. There is none for rollout.engine=kvcache and
for float32. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.algorithms import ALGORITHMS
from rlhf.contracts import SCORED_BY
from rlhf.data.forms import COMPARED
from rlhf.ledger import GIB, Ledger, parameters
from rlhf.model.architecture import Architecture
from rlhf.phases import Kind, Phase, Tenant, Visit

# TFLOP/s of forward and backward by tp, on rows of 4k: train.py, cases "fixed, fused"; tp 8 at 70B's shapes: NOTES.md,
# "The same exchange for four and eight ranks"
TFLOPS = {1: 590.0, 2: 557.0, 4: 511.0, 8: 462.0}
SCORE = 3.08  # rate of log-probs, relative to forward and backward, per token: train.py, score_speedup
OPTIMIZER = 42.0  # bytes per parameter and update: 34 x the 1.23 of train.py's optimizer_bytes_ratio
COPY = 4.15e12  # bytes read and written per second on the device: train.py, copy_tb_per_s
LINK = 330e9  # bytes per second between GPUs of a node in each direction: publish.py, link_gb_per_s
HOST_LINK = 48 * GIB  # bytes per second to and from host memory: switch.py, park_gib_per_s
SWITCH = 0.4  # seconds in which vLLM sleeps and wakes once: fitted to time/switch of step.py, case "grpo 7b"
DECODE = 650.0  # TFLOP/s of vLLM's products: the sustained rate of a large product, NOTES.md
# seconds of vLLM's scheduler and the sampler, in Python, per sequence and token: fitted to step.py, case "rlhf 1b",
# where the device has little to do
HOST = 30e-6
BANDWIDTH = 3.35 / 4.8  # memory bandwidth of an H100, relative to an H200
LARGE = 100.0  # GiB; a device with less is taken for one of 80 GB


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated seconds of a step."""

    phases: Mapping[str, float]  # by the names of the metrics time/; rollout, score, learn, publish
    switch: float  # seconds of these to offload, to restore, and to switch between engine and learner
    lengths: tuple[int, int]  # tokens of a prompt and of a response; offline: of a sample, and 0
    measured: bool  # the rates are measured, not scaled

    @property
    def step(self) -> float:
        return sum(self.phases.values())

    def __str__(self) -> str:
        parts = [f"{name} {taken:.3g}" for name, taken in self.phases.items() if taken]
        parts += [f"of which {self.switch:.2g} to switch and offload"] * (self.switch > 0)
        prompt, response = self.lengths
        whole = f"{prompt} + {response}" if response else f"{prompt}"
        rates = "an H200, measured" if self.measured else "an H100, scaled from an H200"
        return (
            f"estimate: {self.step:.3g} s per step ({', '.join(parts)}),\n"
            f"with samples of {whole} tokens and the rates of {rates} (docs/sizing.md)"
        )


def estimate(ledger: Ledger, prompt: int = 0, response: int = 0) -> Estimate | None:
    """Return the estimate of a step. None: the mode does not train, or no rates were measured for its dtype or engine.

    prompt, response: mean tokens of a sample; 0: as many as data.max_tokens and rollout.max_tokens allow.
    """
    config, mode = ledger.config, ALGORITHMS[ledger.config.mode]
    served = config.rollout.engine == "vllm" or not mode.online
    if not (mode.trains and served and ledger.size == 2 and math.isfinite(ledger.device)):
        return None
    response = response or config.rollout.max_tokens * mode.online
    prompt = prompt or config.data.max_tokens - response
    measured = ledger.device > LARGE
    copy = COPY * (1 if measured else BANDWIDTH)
    group = config.rollout.group if mode.online else 2 if mode.form in COMPARED else 1
    samples = config.batch.prompts * group
    switch = SWITCH * mode.online
    seconds = {
        Phase.ROLLOUT: _rollout(ledger, samples, prompt, response, copy) if mode.online else 0.0,
        Phase.SCORE: sum(_forward(ledger, name, samples, prompt + response) / SCORE for name in _scoring(ledger)),
        Phase.LEARN: sum(
            _learn(ledger, name, samples, prompt + response, copy)
            for name, role in ledger.roles.items()
            if role.use == "train"
        ),
        Phase.PUBLISH: _publish(ledger, copy) + switch if mode.online else 0.0,
    }
    moved = _moved(ledger)
    whole = {str(phase): taken + moved.get(phase, 0.0) for phase, taken in seconds.items()}
    return Estimate(whole, switch + sum(moved.values()), (prompt, response), measured)


def _rollout(ledger: Ledger, samples: int, prompt: int, response: int, copy: float) -> float:
    """Return the seconds of all steps of an engine: equal lengths, one token per sequence and engine step.

    The device reads the weights once per engine step, and the keys and values of all tokens before. Host and device
    overlap in part: the root of the sum of the squares of their times is between full overlap and none.
    """
    arch, tp = ledger.arch, ledger.config.rollout.tp
    all_sequences = -(-samples * tp // ledger.world)
    holds = max(1, int(ledger.cache() / ledger.token() / (prompt + response)))  # sequences in the KV cache at a time
    rounds = -(-all_sequences // holds)
    sequences = all_sequences / rounds
    weights = parameters(arch, "vllm", tp)
    device = ledger.size * weights / copy + sequences * 2 * weights / (DECODE * 1e12)
    device += sequences * (prompt + response / 2) * ledger.token() * GIB / copy
    prefill = all_sequences * prompt * 2 * weights / (DECODE * 1e12)
    return rounds * response * math.hypot(device, HOST * sequences) + prefill


def _learn(ledger: Ledger, name: str, samples: int, tokens: int, copy: float) -> float:
    """Return the seconds of the updates of a role in a step."""
    b, p = ledger.config.batch, ledger.config.parallel
    updates = b.epochs * b.minibatches
    replicas = ledger.world // (p.tp * p.pp * p.cp)
    microbatches = max(1, samples * tokens / (b.minibatches * replicas * b.tokens))
    bubble = 1 + (p.pp - 1) / microbatches  # stages of a pipeline that wait, without interleaving
    recomputed = 4 / 3 if p.recompute == "full" else 1  # a second forward pass
    held = parameters(ledger.roles[name].arch, "megatron", p.tp, p.pp)
    optimizer = OPTIMIZER * held / ledger.shards / copy
    if ledger.shards > 1:  # the updated weights are gathered; gradients are reduced during backward
        optimizer += ledger.size * held / LINK
    return b.epochs * _forward(ledger, name, samples, tokens) * bubble * recomputed + updates * optimizer


def _forward(ledger: Ledger, name: str, samples: int, tokens: int) -> float:
    """Return the seconds of one forward and backward pass over all samples."""
    arch, tp = ledger.roles[name].arch, ledger.config.parallel.tp
    rate = TFLOPS[max(known for known in TFLOPS if known <= tp)] * 1e12
    return samples * tokens * flops(arch, tokens) / (rate * ledger.world)


def flops(arch: Architecture, tokens: int) -> float:
    """Return the FLOPs of forward and backward per token, in sequences of `tokens`. Attention is causal."""
    matrices = arch.num_parameters()
    if not (arch.tied and arch.lm):  # an embedding is no product, unless it is the output layer too
        matrices -= arch.vocab * arch.hidden
    return 6 * matrices + 6 * arch.layers * arch.heads * arch.head_dim * tokens


def _publish(ledger: Ledger, copy: float) -> float:
    """Return the seconds to write the engine's weights: from the same rank, or half of them from others of a node."""
    size, p = ledger.size * parameters(ledger.arch, "vllm", ledger.config.rollout.tp), ledger.config.parallel
    same = p.tp == ledger.config.rollout.tp and p.pp == 1
    return 1.45 * (2 * size / copy if same else size / LINK)  # publish.py, ratio


def _scoring(ledger: Ledger) -> list[str]:
    """Return the roles that make a forward pass over the samples before the updates."""
    streams = ALGORITHMS[ledger.config.mode](ledger.config).streams
    graders = [name for name, role in ledger.roles.items() if name == "reward" and role.use == "frozen"]
    return [SCORED_BY[stream] for stream in streams] + graders


def _moved(ledger: Ledger) -> dict[Phase, float]:
    """Return the seconds by phase to move offloaded tenants to the device, and back to the host after a change.

    Both happen when a phase begins, as in rlhf.residence.
    """
    visits = [visit for visit in ledger.visits if visit.phase == Phase.ROLLOUT]
    visits += [Visit(Phase.SCORE, name) for name in _scoring(ledger)]
    visits += [visit for visit in ledger.visits if visit.phase == Phase.LEARN]
    visits += [visit for visit in ledger.visits if visit.phase == Phase.PUBLISH]
    gib = {tenant: max(stage[tenant] for stage in ledger.tenants) for tenant in ledger.offload}
    copied = {tenant for tenant in gib if tenant.kind != Kind.GRADIENTS}
    changed: set[Tenant] = set()
    found: dict[Phase, float] = {}
    for i, visit in enumerate(visits * 2):  # the second step of two: what the first one changes must leave, too
        before = visits[i % len(visits) - 1]
        leaving = copied & (before.needs - visit.needs) & changed
        moves = [gib[tenant] for tenant in [*leaving, *copied & (visit.needs - before.needs)]]
        changed -= leaving
        if visit.phase == Phase.LEARN:
            changed |= visit.needs
        if i >= len(visits):
            found[visit.phase] = found.get(visit.phase, 0.0) + sum(moves) * GIB / HOST_LINK
    return found

"""Predicts the device memory of a run by tenant and phase, and chooses the tenants to offload so that every phase fits.

The ledger is computed from shapes only, without torch. So all ranks make the same choice, and --dry-run works on a
laptop. rlhf.phases defines tenants and phases. All sizes are GiB on one rank. Pipeline stages differ (embeddings,
unfinished micro-batches); a phase must fit on the stage that needs the most memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache

from rlhf.algorithms import ALGORITHMS
from rlhf.config import CPU_CACHE, Config
from rlhf.errors import UserError
from rlhf.model.architecture import Architecture
from rlhf.parallel.layout import Place
from rlhf.phases import TENANTS, Kind, Phase, Tenant, Visit
from rlhf.shapes import Role
from rlhf.weights import names

GIB = 2**30
# GiB, measured on H200s: used when an engine starts; added by libraries in a step; added by NCCL if there are several
# ranks.
CONTEXT, LOADED, COMMUNICATORS = 1.0, 1.0, 1.4
# GiB that vLLM keeps at sleep level 2, mostly CUDA graphs. False: one rank per engine; True: several.
ASLEEP = {False: 0.25, True: 0.8}
ENGINE_TOKENS = 8192  # vLLM's largest batch of prompt tokens
SLOTS = 3  # buffers for exchanges of hidden states between tensor-parallel ranks (rlhf.parallel.exchange)
LOGITS = 2**25  # elements of a chunk of logits (rlhf.model.logp)
BLOCK = {False: 128, True: 16}  # tokens of a block of vLLM's KV cache. False: on a CPU; True: on a GPU
# values of head_dim that vLLM's attention supports on a CPU
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
MARGIN = 0.05  # share of the device that is reserved for fragmentation in the allocator


class Ledger:
    """The predicted memory of one run on one layout.

    device   GiB of a device; infinite on a CPU, which has no limit
    size     bytes of an element of weights and activations: 2 for bfloat16, 4 for float32
    """

    def __init__(
        self, config: Config, arch: Architecture, roles: Mapping[str, Role], world: int, device: float, size: int
    ):
        """arch: architecture of the policy, and so of the engine. world: number of ranks."""
        self.config, self.arch, self.roles = config, arch, roles
        self.world, self.device, self.size = world, device, size
        p = config.parallel
        self.engine = ALGORITHMS[config.mode].online
        self.shards = world // (p.tp * p.pp) if p.zero else 1  # ranks that share the optimizer state
        self.tenants = [dict(self._tenants(stage)) for stage in range(p.pp)]  # GiB, per pipeline stage
        self.visits = [Visit(Phase.ROLLOUT)] * self.engine + [Visit(Phase.PUBLISH)] * (
            self.engine and "policy" in roles
        )
        self.visits += [Visit(Phase.SCORE, name) for name in roles]
        self.visits += [Visit(Phase.LEARN, name) for name, role in roles.items() if role.use == "train"]
        self.offload = self._choose()

    @property
    def room(self) -> float:
        """Return the GiB that a phase may use."""
        return self.device * (1 - MARGIN)

    def rows(self, visit: Visit, stage: int, offload: Collection[Tenant] | None = None) -> dict[str, float]:
        """Return the GiB of everything on the device in a phase, by name. offload: tenants that may be on the host."""
        away, needs = self.offload if offload is None else offload, visit.needs
        context = CONTEXT + LOADED + COMMUNICATORS * (self.world > 1)
        rows = {"context": context if self._on_gpu else 0.0}
        if self.config.parallel.exchanges and self._on_gpu:
            widest = max((role.arch.hidden for role in self.roles.values()), default=0)
            rows["exchange"] = SLOTS * self.size * self._tokens() * widest / GIB
        if self.engine:
            rows |= self._engine(visit)
        rows |= {
            str(tenant): gib for tenant, gib in self.tenants[stage].items() if tenant in needs or tenant not in away
        }
        rows["work"] = 0.0 if visit.is_engines else self._work(visit.phase, self.roles[visit.role].arch, stage)
        return rows

    def need(self, visit: Visit, offload: Collection[Tenant] | None = None) -> float:
        """Return the GiB of a phase on the stage that needs the most."""
        return max(sum(self.rows(visit, stage, offload).values()) for stage in range(len(self.tenants)))

    def mean(self, visit: Visit) -> dict[str, float]:
        """Return the GiB of everything on the device in a phase, by name: the mean over the pipeline stages."""
        stages = [self.rows(visit, stage) for stage in range(len(self.tenants))]
        return {name: sum(rows[name] for rows in stages) / len(stages) for name in stages[0]}

    def check(self, free: float = math.inf) -> None:
        """Raise UserError unless every phase fits and the engine's KV cache can hold at least one sequence.

        free: free GiB of the device, or on a CPU of host memory, for one rank. Every phase must fit into it too.
        """
        if self._serves and not self._on_gpu and self.arch.head_dim not in CPU_HEADS:
            raise UserError(
                f"policy.load={self.config.policy.load} has a head_dim of {self.arch.head_dim}, but vLLM on a CPU "
                f"supports only {', '.join(map(str, CPU_HEADS))}: set rollout.engine=kvcache"
            )
        fault = self.fault()
        if fault:
            remedies = (text for text, config in _remedies(self.config) if self._fits(config))
            larger = "split it over more ranks (parallel.tp, parallel.pp), or use larger devices"
            raise UserError(f"{fault}: {next(remedies, larger)}")
        fullest = max(self.visits, key=self.need)
        if not self._on_gpu and self.need(fullest) > free:
            raise UserError(
                f"phase {fullest} needs {self.need(fullest):.1f} GiB, but this node has {free:.1f} GiB for each rank: "
                "lower batch.tokens or rollout.cache, or use a larger machine"
            )
        if self.need(fullest) > free + CONTEXT:  # this process already uses CONTEXT
            raise UserError(
                f"phase {fullest} needs {self.need(fullest):.1f} GiB, but only {free:.1f} GiB of the device are free: "
                "end the programs that use it (nvidia-smi lists them), or use another device (CUDA_VISIBLE_DEVICES)"
            )

    def table(self, peaks: Mapping[Visit, float] | None = None, stage: int | None = None) -> str:
        """Return a text table of the GiB by tenant and phase, of a stage or of the one that needs the most.

        peaks: measured GiB, which the table shows below the predicted ones.
        """
        if stage is None:
            stage = max(
                range(len(self.tenants)), key=lambda s: max(sum(self.rows(visit, s).values()) for visit in self.visits)
            )
        columns = [self.rows(visit, stage) for visit in self.visits]
        tenants, away = [str(tenant) for tenant in self.tenants[0]], [str(tenant) for tenant in self.offload]
        others = dict.fromkeys(name for column in columns for name in column if name not in tenants and name != "work")
        names = [*others, *tenants, "work"]
        lines = [["GiB per rank", *map(str, self.visits)]]
        lines += [
            [name + " *" * (name in away), *(f"{c[name]:.1f}" if c.get(name) else "-" for c in columns)]
            for name in names
        ]
        lines.append(["predicted", *(f"{sum(column.values()):.1f}" for column in columns)])
        if peaks is not None:
            lines.append(["measured", *(f"{peaks[visit]:.1f}" if visit in peaks else "-" for visit in self.visits)])
        first = max(len(line[0]) for line in lines)
        widths = [max(len(str(visit)), 6) for visit in self.visits]
        text = [
            line[0].ljust(first) + "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], widths, strict=True))
            for line in lines
        ]
        room = f"{self.room:.1f} of {self.device:g} GiB may be used" if self._on_gpu else "host memory"
        note = "nothing is offloaded"
        if self.offload:
            memory = f"which needs {self.host(stage):.1f} GiB of host memory"
            note = f"tenants with * are offloaded in the phases that do not use them, {memory}"
        if copies := self.copies(stage):
            note += f"; a save copies {copies:.1f} GiB to host memory"
        return "\n".join([*text, f"({room}; pipeline stage {stage} of {len(self.tenants)}; {note})"])

    def host(self, stage: int) -> float:
        """Return the GiB of host memory for a rank's offloaded tenants. Gradients need none, as they start at 0."""
        return sum(self.tenants[stage][tenant] for tenant in self.offload if tenant.kind != Kind.GRADIENTS)

    def copies(self, stage: int) -> float:
        """Return the GiB of host memory for a rank's copies of the training state (rlhf.writer)."""
        p = self.config.parallel
        trained = [role.arch for role in self.roles.values() if role.use == "train"]
        count = sum(parameters(arch, "megatron", p.tp, p.pp, stage) for arch in trained)
        # main parameters and two moments in float32
        return 12 * count / self.shards / GIB * self.config.checkpoint.background

    def _tenants(self, stage: int) -> Iterator[tuple[Tenant, float]]:
        """Yield each tenant of the roles and its GiB."""
        p = self.config.parallel
        for name, role in self.roles.items():
            count = parameters(role.arch, "megatron", p.tp, p.pp, stage)
            # Two moments and the main parameters in float32. Float32 weights need no separate main parameters.
            state = 12 if self.size == 2 else 8
            held = {
                Kind.WEIGHTS: self.size * count,
                Kind.GRADIENTS: 4 * count,
                Kind.OPTIMIZER: state * count / self.shards,
            }
            yield from ((Tenant(name, kind), held[kind] / GIB) for kind in TENANTS[role.use])

    def _choose(self) -> frozenset[Tenant]:
        """Return the tenants to offload: as few as possible, and cheap ones first.

        To move gradients costs no copy, frozen weights one (to the device), other tenants two.
        """
        cost = {Kind.GRADIENTS: 0, Kind.OPTIMIZER: 2, Kind.WEIGHTS: 3}
        movable = sorted(
            self.tenants[0], key=lambda tenant: 1 if self.roles[tenant.role].use == "frozen" else cost[tenant.kind]
        )
        if self.config.memory.offload != "auto":
            return frozenset(movable if self.config.memory.offload == "all" else ())
        chosen: list[Tenant] = []
        for visit in self.visits:
            for tenant in movable:
                if self.need(visit, chosen) > self.room and tenant not in chosen and tenant not in visit.needs:
                    chosen.append(tenant)
        for tenant in reversed(chosen):  # keep tenants that need not be offloaded because others are
            fewer = [other for other in chosen if other != tenant]
            if all(self.need(visit, fewer) <= max(self.room, self.need(visit, chosen)) for visit in self.visits):
                chosen = fewer
        return frozenset(chosen)

    def _engine(self, visit: Visit) -> dict[str, float]:
        """Return the GiB of the engine in a phase, by name. The KV cache is allocated in the rollout phase only."""
        r, real = self.config.rollout, self._serves and self._on_gpu
        rows = {"engine graphs": ASLEEP[r.tp > 1] if real else 0.0}
        if visit.is_engines:
            rows["engine weights"] = self.size * parameters(self.arch, "vllm", r.tp) / GIB
        if visit.phase == Phase.PUBLISH:
            rows["messages"] = r.bucket / 1024 if self.world > 1 else 0.0
        if visit.phase == Phase.ROLLOUT:
            rows["engine cache"] = self.cache() if self._serves else 0.0
            rows["engine work"] = _engine_work(self.arch, r.tp, self.size) if real else 0.0
        return rows

    def cache(self) -> float:
        """Return the GiB of vLLM's KV cache: rollout.cache, or the rest of the engine's share (rollout.memory).

        The share includes CONTEXT.
        """
        r, arch = self.config.rollout, self.arch
        if r.cache or not self._on_gpu:
            return r.cache or CPU_CACHE
        weights = self.size * parameters(arch, "vllm", r.tp) / GIB
        return max(0.0, r.memory * self.device - CONTEXT - weights - _engine_work(arch, r.tp, self.size))

    def sequences(self) -> float:
        """Return how many sequences of data.max_tokens tokens fit into the engine's KV cache."""
        return self.cache() / (self.token() * self.config.data.max_tokens)

    def token(self) -> float:
        """Return the GiB of the keys and values of one token on one rank of the engine."""
        heads = max(1, self.arch.kv_heads // self.config.rollout.tp)
        return 2 * self.arch.layers * heads * self.arch.head_dim * self.size / GIB

    def _least(self) -> float:
        """Return the GiB of KV cache for one sequence of data.max_tokens tokens. vLLM needs one extra block."""
        block = BLOCK[self._on_gpu]
        return self.token() * block * (-(-self.config.data.max_tokens // block) + 1)

    @property
    def _on_gpu(self) -> bool:
        return math.isfinite(self.device)

    @property
    def _serves(self) -> bool:
        """Return whether the engine is vLLM."""
        return self.engine and self.config.rollout.engine == "vllm"

    def _work(self, phase: Phase, arch: Architecture, stage: int) -> float:
        """Return the GiB of activations and temporary tensors of a model in a phase (score or learn)."""
        p, t = self.config.parallel, self._tokens()
        last = stage == p.pp - 1
        if phase == Phase.SCORE:
            return self.size * t * (5 * arch.hidden + 3 * arch.ffn / p.tp) / GIB + (
                self._logits(arch, t, train=False) if last else 0
            )
        split = p.tp if p.sp else 1  # ranks that split the tokens of tensors that are not split by heads or columns
        q, kv = arch.heads * arch.head_dim / p.tp, arch.kv_heads * arch.head_dim / p.tp
        # Saved for backward: inputs and outputs of both norms, qkv before and after rotation, output of attention, and
        # inputs and output of SwiGLU.
        layer = 4 * arch.hidden / split + (q + 2 * kv) + (q + kv) + q + 3 * arch.ffn / p.tp
        # Computed again by "selective". With grouped queries, attention saves a copy of the rotated queries.
        again = kv if arch.heads > arch.kv_heads else q + kv
        kept = {"none": layer, "selective": layer - again, "full": arch.hidden / split}[p.recompute]
        flying = p.pp - stage  # micro-batches between their forward and backward passes (1F1B)
        saved = self.size * t * (kept * arch.layers / p.pp * flying + (layer if p.recompute == "full" else 0))
        backward = self.size * t * (3 * arch.ffn / p.tp + 3 * arch.hidden) / GIB
        return saved / GIB + max(backward, self._logits(arch, t, train=True) if last else 0)

    def _tokens(self) -> float:
        """Return the tokens of the largest micro-batch on one context-parallel rank. A pair is never split."""
        whole = 2 if ALGORITHMS[self.config.mode].whole_groups else 1
        return max(self.config.batch.tokens, whole * self.config.data.max_tokens) / self.config.parallel.cp

    def _logits(self, arch: Architecture, t: float, train: bool) -> float:
        """Return the GiB of the output layer for t tokens: a chunk of logits, hidden states, and their gradients."""
        if not arch.lm:
            return 0.0
        rows = arch.padded_vocab(self.config.parallel.tp) / self.config.parallel.tp
        chunk, hidden = min(LOGITS, t * rows), self.size * t * arch.hidden
        forward = 8 * chunk + hidden
        return (
            max(forward, (4 + self.size) * chunk + (4 + self.size) * rows * arch.hidden + 2 * hidden if train else 0)
            / GIB
        )

    def fault(self) -> str:
        """Return an error message for the first phase that does not fit, or ""."""
        if self._serves and self.cache() < self._least():
            r = self.config.rollout
            share = f"rollout.memory={r.memory:g} of {self.device:g} GiB"
            what = (
                f"the engine's share ({share}) leaves"
                if self._on_gpu and not r.cache
                else "rollout.cache gives the engine"
            )
            needed = f"the {self._least():.2g} GiB that one sequence of data.max_tokens needs"
            return f"{what} {self.cache():.2g} GiB of cache, less than {needed}"
        for visit in self.visits if self._on_gpu else ():
            if self.need(visit) > self.room:
                limit = f"{self.room:.1f} of {self.device:g} GiB may be used"
                return f"phase {visit} needs {self.need(visit):.1f} GiB, but only {limit}"
        return ""

    def _fits(self, config: Config) -> bool:
        """Return whether a run with this configuration would fit."""
        tp = config.rollout.tp
        try:
            self.arch.check_split(tp, said=(f"rollout.tp={tp}", ""))
        except UserError:  # this configuration would be refused for another reason
            return False
        changed = Ledger(config, self.arch, self.roles, self.world, self.device, self.size)
        return self.world % tp == 0 and not changed.fault()


@cache  # every phase and every remedy calls it again
def parameters(arch: Architecture, layout: str, tp: int, pp: int = 1, stage: int = 0) -> int:
    """Return the number of parameters of one rank of a model, including the padding of the vocabulary."""
    return sum(map(math.prod, names.parameters(arch, layout, Place((0, tp), (stage, pp))).values()))


def _engine_work(arch: Architecture, tp: int, size: int) -> float:
    return size * ENGINE_TOKENS * (4 * arch.hidden + 3 * arch.ffn // tp) / GIB


def _remedies(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield single changes of the configuration that need less memory: (advice, configuration), cheapest first."""
    p, r, b = config.parallel, config.rollout, config.batch
    if r.cache:
        yield "set rollout.cache=0", replace(config, rollout=replace(r, cache=0))
    if config.memory.offload != "auto":
        yield "set memory.offload=auto", replace(config, memory=replace(config.memory, offload="auto"))
    # Values of rollout.memory that are nearest to the current one come first.
    for share in sorted((0.05 * i for i in range(2, 19)), key=lambda share: abs(share - r.memory)):
        yield f"set rollout.memory={share:.2g}", replace(config, rollout=replace(r, memory=share))
    if not p.zero:
        yield "set parallel.zero=true", replace(config, parallel=replace(p, zero=True))
    for recompute in ("selective", "full"):
        yield f"set parallel.recompute={recompute}", replace(config, parallel=replace(p, recompute=recompute))
    for tokens in (b.tokens // 2, b.tokens // 4):
        yield f"set batch.tokens={tokens}", replace(config, batch=replace(b, tokens=tokens))
    for tp in (2 * r.tp, 4 * r.tp):
        yield f"set rollout.tp={tp}", replace(config, rollout=replace(r, tp=tp))
    for gib in (2.0**i for i in range(-1, 7)):
        yield f"set rollout.cache={gib:g}", replace(config, rollout=replace(r, cache=gib))

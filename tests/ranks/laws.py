"""Run under torchrun: logits, log-probs, gradients, export and engine of every family at several layouts, against transformers.

usage: torchrun --nproc-per-node N tests/ranks/laws.py FOLDER LAYOUT ...      LAYOUT as tp2-pp1-cp1-sp0-zero1-recomputefull
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import FAMILIES, reference_logits, reference_logp, samples

from rlhf import config as configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.contracts import Sampling
from rlhf.data.packing import microbatches, shares
from rlhf.model import architecture
from rlhf.parallel.mesh import Mesh
from rlhf.rollout.kvcache import KVCache
from rlhf.train.learner import Learner
from rlhf.weights import files, names
from rlhf.weights.publish import Publisher
from rlhf.weights.tiles import plan, view

LR = 0.1


def parse(layout: str) -> list[str]:
    """tp2-recomputefull -> parallel.tp=2 parallel.recompute=full"""
    pairs = [re.match(r"([a-z]+?)(\d+|none|full|selective)$", part).groups() for part in layout.split("-")]
    return [f"parallel.{key}={bool(int(value)) if key in ('sp', 'zero') else value}".replace("True", "true").replace("False", "false") for key, value in pairs]


def expected_update(model: torch.nn.Module, mode: str, made: list) -> dict[str, torch.Tensor]:
    """Parameters after one AdamW update with eps 1 (a smooth function of the gradient), by autograd through transformers."""
    model.zero_grad()
    total, count = 0.0, 0.0
    for s in made:
        logp, mask = reference_logp(model, s), torch.from_numpy(s.mask)
        if mode == "sft":
            total, count = total - logp[mask].sum(), count + mask.sum()
            continue
        ratio = (logp - torch.from_numpy(s.old_logp)).exp()
        advantages = torch.from_numpy(s.advantages)
        surrogate = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        gap = torch.from_numpy(s.ref_logp) - logp
        per_token = surrogate + 0.04 * (gap.exp() - gap - 1)
        total, count = total + per_token[mask].mean(), count + 1
    (total / count).backward()
    return {name: p.detach() - LR * p.grad / (p.grad.abs() + 1) for name, p in model.named_parameters()}


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    gap = (found - wanted).abs().max().item() if found.numel() else 0.0
    assert gap < tolerance, f"{what}: differs by {gap:.3g}"


def check(folder: Path, family: str, layout: str, out: Path) -> None:
    import transformers

    overrides = [*parse(layout), f"policy.load={folder}", f"optim.lr={LR}", "optim.eps=1", "optim.clip=0", "rollout.temperature=1"]
    config = configuration.load("grpo", overrides)
    mesh = Mesh(config.parallel, 1)
    arch = architecture.read(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sharding = names.tilings(arch, "mcore", mesh.world, config.parallel.tp, config.parallel.pp)
    mine = sharding[mesh.rank]
    made, what = samples(), f"{family} {layout}"

    def learner(train: bool) -> Learner:
        fill = partial(files.read, folder, arch, mine)
        return Learner(arch, config, mesh, torch.float32, fill=fill, temperature=1.0, train=train)

    def cut(budget: int) -> list:
        return microbatches(shares(made, mesh.layout.dp, arch.hidden), budget, False)[mesh.dp_rank]

    # Logits of whole packed rows, straight from the hidden states.
    frozen = learner(train=False)

    def logits(batch, hidden, non_loss_data=True):
        hidden = hidden[0]
        if frozen.sequence_parallel:
            parts = [torch.empty_like(hidden) for _ in range(mesh.layout.tp)]
            torch.distributed.all_gather(parts, hidden.contiguous(), group=mesh.tp_group)
            hidden = torch.cat(parts)
        return batch, hidden @ frozen.decoder.head_weight().T

    rows = cut(10_000)
    with torch.no_grad():
        packed = frozen._schedule([frozen._pack(row) for row in rows], logits, train=False)
        wanted = {id(s): reference_logits(model, s) for s in made}
    first = mesh.tp_rank * (arch.padded_vocab(mesh.layout.tp) // mesh.layout.tp)
    for row, (batch, found) in zip(rows, packed, strict=False):
        whole = torch.cat([wanted[id(s)] for s in row]) if row else torch.empty(0, arch.vocab)
        real = batch.places < len(whole)
        columns = slice(first, min(arch.vocab, first + found.shape[1]))
        close(found[real][:, : columns.stop - columns.start], whole[batch.places[real]][:, columns], 1e-5, f"{what}: logits")

    # Log-probs, on every rank, for two ways to pack.
    with torch.no_grad():
        wanted_logp = {id(s): reference_logp(model, s) for s in made}
    for budget in (100, 10_000):
        mini = cut(budget)
        for s, stream in zip([s for b in mini for s in b], frozen.score(mini), strict=True):
            close(torch.from_numpy(stream), wanted_logp[id(s)], 1e-5, f"{what}: log-probs packed by {budget}")

    # Engine: publish to a kvcache engine of another layout; its log-probs are the learner's.
    for tp in {1, mesh.world}:
        if arch.kv_heads % tp and tp % arch.kv_heads:
            continue
        engine = KVCache(arch, tp=tp, tp_rank=mesh.rank % tp, group=mesh.subgroup(tp), dtype=torch.float32, device="cpu", max_len=64)
        engine.sleep()
        engine.wake_weights()
        targets = names.tilings(arch, "vllm", mesh.world, tp)
        Publisher(plan(sharding, targets, mesh.nodes()), mesh.rank, torch.float32, bucket=1 << 16).publish(frozen.parameters(), engine.parameters())
        engine.wake()
        prompt = [5, 6, 7, 8]
        done = engine.generate([prompt], Sampling(max_tokens=8), seeds=[11])[0]
        with torch.no_grad():
            log_softmax = model(torch.tensor([prompt + done.tokens])).logits[0].log_softmax(-1)
        said = torch.stack([log_softmax[3 + i, t] for i, t in enumerate(done.tokens)])
        close(torch.tensor(done.logp), said, 1e-5, f"{what}: engine tp{tp}")

    # One update for each algorithm and packing: the gradient is the same function of the samples.
    for mode, budget in (("sft", 10_000), ("grpo", 100), ("grpo", 10_000)):
        algorithm = ALGORITHMS[mode](config)
        student = learner(train=True)
        student.learn(cut(budget), partial(algorithm.loss, "policy"), LR)
        updated = expected_update(model, mode, made)
        whole = {tile.name: tile for tile in names.tiles(arch, "hf")}
        shards = student.parameters()
        for tile in mine:
            wanted_box = view(updated[tile.name], whole[tile.name], tile.box)
            close(view(shards[tile.local], tile, tile.box), wanted_box, 2e-6, f"{what}: {mode} update packed by {budget} of {tile.name}")

    # Format: what was read is written back bit by bit.
    files.write(out, arch, {}, sharding, frozen.parameters(), rank=mesh.rank, nodes=mesh.nodes(), dtype=torch.float32)
    if mesh.rank == 0:
        from safetensors.torch import load_file

        original, written = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
        assert set(original) == set(written), f"{what}: {set(original) ^ set(written)}"
        assert all(torch.equal(original[n], written[n]) for n in original), f"{what}: export is not bitwise"
    mesh.close()


def main() -> None:
    root, layouts = Path(sys.argv[1]), sys.argv[2:]
    for layout in layouts:
        for family in FAMILIES:
            check(root / family, family, layout, root / f"out-{family}-{layout}")
    assert np.isfinite(1.0)
    print("laws hold", flush=True)


if __name__ == "__main__":
    main()

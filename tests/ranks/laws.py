"""Run under torchrun: compare every family at several layouts with transformers.

Logits, log-probs, gradients, export, resume and engine are compared, and on one rank the scores of reward models. Then
checkpoints resume at other layouts.

usage: torchrun --nproc-per-node N tests/ranks/laws.py FOLDER LAYOUT[:FAMILY] ...

A LAYOUT is like tp2-pp1-cp1-sp0-zero1-recomputefull. With +megatron after it, tensor-parallel ranks use the linear
layers of megatron-core, as where the exchange is slower.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import groups
import resharding
import scores
from models import FAMILIES, layout_keys, reference_logits, reference_logp, samples

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.checkpoint import Checkpoints
from rlhf.contracts import Batch, Sample, Sampling
from rlhf.data.packing import microbatches, shares
from rlhf.model import architecture, build, linear
from rlhf.parallel.mesh import Mesh
from rlhf.rollout.kvcache import KVCache
from rlhf.train.learner import Learner
from rlhf.weights import export, files, names
from rlhf.weights.plan import Plan
from rlhf.weights.publish import Publisher
from rlhf.weights.tiles import view

LR = 0.1
EXCHANGING = build.pays, linear.exchange


def expected_update(model: torch.nn.Module, mode: str, made: list) -> dict[str, torch.Tensor]:
    """Return the parameters after one AdamW update with eps 1, by autograd through transformers.

    With eps 1 the update is a smooth function of the gradient.
    """
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


class Case:
    """One family at one layout, whose mesh may be that of another family."""

    def __init__(self, folder: Path, layout: str, mesh: Mesh | None = None):
        overrides = [*layout_keys(layout), f"policy.load={folder}", f"optim.lr={LR}", "optim.eps=1", "optim.clip=0"]
        self.folder, self.what = folder, f"{folder.name} {layout}"
        self.config = configuration.load(
            "grpo", ["batch.minibatches=2", *overrides]
        )  # so that old_logp is a separate stream
        self.mesh = mesh or Mesh(self.config.parallel, 1)
        self.arch = architecture.read(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.sharding = names.tilings(
            self.arch, "megatron", self.mesh.world, self.config.parallel.tp, self.config.parallel.pp
        )
        self.samples = samples()

    def learner(self, train: bool, dtype: torch.dtype = torch.float32) -> Learner:
        fill = partial(files.read, self.folder, self.arch, self.sharding[self.mesh.rank])
        return Learner(self.arch, self.config, self.mesh, dtype, fill=fill, temperature=1.0, train=train)

    def cut(self, budget: int) -> list[list[Sample]]:
        share = shares(self.samples, self.mesh.layout.dp, self.arch.hidden)[self.mesh.dp_rank]
        return microbatches(share, budget, False, self.mesh.largest)

    def check_logits(self, learner: Learner) -> None:
        """Compare the whole logits of packed rows, from the hidden states, with each sequence alone in transformers."""
        mesh, vocab = self.mesh, self.arch.vocab

        def logits(batch: Batch, hidden: torch.Tensor, non_loss_data: bool = True) -> tuple[Batch, torch.Tensor]:
            hidden = hidden[0]
            if learner.sequence_parallel:
                parts = [torch.empty_like(hidden) for _ in range(mesh.layout.tp)]
                torch.distributed.all_gather(parts, hidden.contiguous(), group=mesh.tp_group)
                hidden = torch.cat(parts)
            return batch, hidden @ learner.decoder.head_weight().T

        rows = self.cut(10_000)
        with torch.no_grad():
            packed = learner._schedule(map(learner._pack, rows), len(rows), logits, train=False)
            wanted = {id(s): reference_logits(self.model, s) for s in self.samples}
        assert len(packed) == (len(rows) if mesh.is_last_stage else 0)
        for row, (batch, found) in zip(rows, packed, strict=False):
            whole = torch.cat([wanted[id(s)] for s in row])
            real = batch.places < len(whole)
            first = mesh.tp_rank * found.shape[1]
            columns = slice(first, min(vocab, first + found.shape[1]))
            close(
                found[real][:, : columns.stop - first],
                whole[batch.places[real]][:, columns],
                1e-5,
                f"{self.what}: logits",
            )

    def check_logp(self, learner: Learner) -> None:
        """Check the log-probs on every rank, for two ways to pack."""
        with torch.no_grad():
            wanted = {id(s): reference_logp(self.model, s) for s in self.samples}
        for budget in (100, 10_000):
            mini = self.cut(budget)
            for s, stream in zip([s for b in mini for s in b], learner.score(mini), strict=True):
                close(torch.from_numpy(stream), wanted[id(s)], 1e-5, f"{self.what}: log-probs packed by {budget}")

    def check_engine(self, learner: Learner) -> None:
        """Publish to engines of other layouts, after sleep.

        Compare the log-probs of their samples with transformers.
        """
        mesh, arch = self.mesh, self.arch
        for tp in {1, mesh.world}:
            engine = KVCache(
                arch,
                tp=tp,
                tp_rank=mesh.rank % tp,
                group=mesh.subgroup(tp),
                dtype=torch.float32,
                device="cpu",
                max_len=64,
            )
            engine.sleep()
            engine.wake_weights()
            moves = Plan(self.sharding, names.tilings(arch, "vllm", mesh.world, tp), mesh.nodes())
            Publisher(moves, mesh.rank, torch.float32, bucket=1 << 16).publish(
                learner.parameters(), engine.parameters()
            )
            engine.wake()
            prompt = [5, 6, 7, 8]
            done = engine.generate([prompt], Sampling(max_tokens=8), seeds=[11])[0]
            with torch.no_grad():
                said = self.model(torch.tensor([prompt + done.tokens])).logits[0, 3:-1].log_softmax(-1)
            close(
                torch.tensor(done.logp),
                said.gather(1, torch.tensor(done.tokens)[:, None])[:, 0],
                1e-5,
                f"{self.what}: engine tp{tp}",
            )

    def check_update(self, mode: str, budgets: tuple[int, ...]) -> None:
        """Check one update: the gradient depends on the samples, and not on packing or layout."""
        algorithm, updated = ALGORITHMS[mode](self.config), expected_update(self.model, mode, self.samples)
        whole = {tile.name: tile for tile in names.tiles(self.arch, "hf")}
        for budget in budgets:
            learner = self.learner(train=True)
            learner.learn(self.cut(budget), partial(algorithm.loss, "policy"), LR)
            shards, what = learner.parameters(), f"{self.what}: {mode} update packed by {budget}"
            for tile in self.sharding[self.mesh.rank]:
                wanted = view(updated[whole[tile.name].local], whole[tile.name], tile.box)
                close(view(shards[tile.local], tile, tile.box), wanted, 2e-6, f"{what} of {tile.name}")

    def check_step_zero(self, learner: Learner) -> None:
        """Policy, old policy and reference are one model: the ratio is 1, nothing is clipped, and the KL is 0."""
        cut, algorithm = self.cut(10_000), ALGORITHMS["grpo"](self.config)
        for s, stream in zip([s for b in cut for s in b], learner.score(cut), strict=True):
            s.old_logp = s.ref_logp = stream
        for name, (total, count) in learner.evaluate(cut, partial(algorithm.loss, "policy")).items():
            if name in ("kl", "clipped"):
                assert abs(total / count) < 1e-9, f"{self.what}: {name} is {total / count}"

    def check_resume(self, out: Path, dtype: torch.dtype) -> None:
        """Save a checkpoint after two updates, and make one more.

        A new learner that loads it has the same state, and makes the same update, bitwise.
        """
        config = dataclasses.replace(self.config, out=str(out))
        checkpoints, loss = Checkpoints(config, self.mesh, dtype), partial(ALGORITHMS["grpo"](config).loss, "policy")
        first, second, cut = self.learner(True, dtype), self.learner(True, dtype), self.cut(10_000)
        for _ in range(2):
            first.learn(cut, loss, LR)
        checkpoints.save(2, {"policy": first}.items(), {"coefficient": 0.1})
        checkpoints.settle(wait=True)
        saved = {name: p.clone() for name, p in first.parameters().items()}
        first.learn(cut, loss, LR)
        state: dict[str, float] = {}
        assert checkpoints.resume({"policy": second}.items(), state) == 2
        assert state == {"coefficient": 0.1}
        assert all(torch.equal(saved[name], p) for name, p in second.parameters().items()), (
            f"{self.what}: not what was saved"
        )
        second.learn(cut, loss, LR)
        wanted = first.parameters()
        assert all(torch.equal(wanted[name], p) for name, p in second.parameters().items()), (
            f"{self.what}: resume is not bitwise"
        )

    def check_export(self, learner: Learner, out: Path) -> None:
        """Check that weights are written back bitwise."""
        mesh = self.mesh
        export.write(
            out,
            self.arch,
            {},
            self.sharding,
            learner.parameters(),
            rank=mesh.rank,
            nodes=mesh.nodes(),
            dtype=torch.float32,
        )
        original, written = load_file(self.folder / "model.safetensors"), load_file(out / "model.safetensors")
        assert set(original) == set(written), f"{self.what}: {set(original) ^ set(written)}"
        assert all(torch.equal(original[n], written[n]) for n in original), f"{self.what}: export is not bitwise"


def main() -> None:
    root, layouts = Path(sys.argv[1]), sys.argv[2:]
    for entry, _, only in (entry.partition(":") for entry in layouts):
        layout, _, megatron = entry.partition("+")
        build.pays, linear.exchange = ((lambda group: False), None) if megatron else EXCHANGING  # type: ignore[assignment]
        mesh = None
        for family in [only] if only else FAMILIES:
            case = Case(root / family, layout, mesh)
            mesh = case.mesh
            frozen = case.learner(train=False)
            case.check_logits(frozen)
            case.check_logp(frozen)
            case.check_engine(frozen)
            case.check_update("sft", (10_000,))
            case.check_update("grpo", (100, 10_000))
            case.check_export(frozen, root / f"out-{family}-{entry}")
            for dtype in (torch.float32, torch.bfloat16)[
                : 1 + (family == "llama3-tied")
            ]:  # bfloat16 has separate main parameters
                case.check_resume(root / f"run-{family}-{entry}-{dtype}", dtype)
            case.check_step_zero(frozen)
            if entry == "tp1":
                scores.check(case.folder, case.mesh, root / f"reward-{family}")
        groups.close()
    build.pays, linear.exchange = EXCHANGING
    world = int(os.environ["WORLD_SIZE"])
    for dtype in (torch.float32, torch.bfloat16):
        resharding.check(partial(Case, root / "llama3-tied"), world, root / f"layouts-{dtype}", dtype, LR)
    print("laws hold", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

"""Megatron's sharded checkpoints (torch_dist): exchanged with megatron-core, and as other releases write them."""

import io
import os
import pickle
import sys
import types
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from commands import run_ranks
from test_convert import hf_folder, run, tensors_of
from test_megatron_damage import Malice
from test_tiles import LLAMA, mcore_rank
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from rlhf.errors import UserError
from rlhf.weights import files
from rlhf.weights.formats import inspect


def test_megatron_core_loads_and_saves_what_we_save_and_load(tmp_path: Path):
    """Folders at TP2 are exchanged with megatron-core's dist_checkpointing, in both directions."""
    arch = replace(LLAMA, vocab=128)
    wanted = hf_folder(tmp_path / "hf", arch, torch.float32)
    run("--from", tmp_path / "hf", "--to", tmp_path / "ours", "--format", "torch_dist")
    folders = (tmp_path / "hf", tmp_path / "ours/iter_0000001", tmp_path / "theirs")
    run_ranks(2, "tests/ranks/sharded.py", *map(str, folders), CUDA_VISIBLE_DEVICES="")
    for rank in range(2):
        held, right = torch.load(tmp_path / f"theirs/state-{rank}.pt"), mcore_rank(arch, wanted, (rank, 2), (0, 1))
        assert held.keys() == right.keys()
        assert all(torch.equal(held[name], right[name]) for name in right)
    run("--from", tmp_path / "theirs", "--to", tmp_path / "back", "--format", "hf", "--config", tmp_path / "hf")
    got = tensors_of(tmp_path / "back")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_args_may_lie_among_the_shards(tmp_path: Path):
    """megatron-core 0.19 writes no common.pt: its content is an additional object in a file of shards."""
    hf_folder(tmp_path / "hf", LLAMA)
    run("--from", tmp_path / "hf", "--to", tmp_path / "sharded", "--format", "torch_dist", "--iteration", 4)
    folder = tmp_path / "sharded/iter_0000004"
    stored = io.BytesIO()
    torch.save([torch.load(folder / "common.pt", weights_only=False)], stored)
    (folder / "common.pt").unlink()
    (tmp_path / "sharded/config.json").unlink()
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    with (folder / "__0_0.distcp").open("ab") as file:
        place = _StorageInfo("__0_0.distcp", file.tell(), file.write(stored.getvalue()))
    metadata.storage_data[MetadataIndex("common_state/shard_0_1")] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert files.read_architecture(tmp_path / "sharded") == LLAMA
    assert inspect(tmp_path / "sharded").iteration == 4
    for spoilt in (pickle.dumps(metadata)[:-100], pickle.dumps([])):
        (folder / ".metadata").write_bytes(spoilt)
        with pytest.raises(UserError, match=r"\.metadata: damaged"):
            files.open_folder(tmp_path / "sharded", LLAMA)


def test_metadata_of_older_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """megatron-core up to 0.15 derived its metadata and its plans from classes of torch."""
    hf_folder(tmp_path / "hf", LLAMA)
    run("--from", tmp_path / "hf", "--to", tmp_path / "sharded", "--format", "torch_dist")
    path = tmp_path / "sharded/iter_0000001/.metadata"
    module = "megatron.core.dist_checkpointing.strategies.torch"
    derived = {name: type(name, (), {"__module__": module}) for name in ("MCoreMetadata", "MCoreSavePlan")}
    with monkeypatch.context() as patch:
        for part in accumulate(module.split("."), "{}.{}".format):
            patch.setitem(sys.modules, part, types.SimpleNamespace(**derived))
        metadata, plan = derived["MCoreMetadata"](), derived["MCoreSavePlan"]()
        plan.__dict__.update(items=[], mcore_data={})
        metadata.__dict__.update(vars(pickle.loads(path.read_bytes())), all_local_plans=[plan], mcore_data={})
        path.write_bytes(pickle.dumps(metadata))
    files.open_folder(tmp_path / "sharded", LLAMA)


def test_metadata_that_asks_for_code_is_refused(tmp_path: Path):
    hf_folder(tmp_path / "hf", LLAMA)
    run("--from", tmp_path / "hf", "--to", tmp_path / "sharded", "--format", "torch_dist")
    mark = tmp_path / "executed"
    (tmp_path / "sharded/iter_0000001/.metadata").write_bytes(pickle.dumps(Malice(os.system, f"touch {mark}")))
    with pytest.raises(UserError, match=r"\.metadata: it asks for posix\.system"):
        files.open_folder(tmp_path / "sharded", LLAMA)
    assert not mark.exists()

"""Pickles of every Python version: an enum member is written in several ways, and all of them are read safely.

Python 3.11.2 (Debian 12) writes getattr(enum, name), and writes members of signal.Signals as globals. Python 3.11.7 and
later write enum(value). tests/fixtures/enums-by-name.* and enums-by-value.* were written by these two versions (see
make), with the packages of requirements/cpu.txt:

    PYTHONPATH=. python tests/test_pickles.py tests/fixtures
"""

import argparse
import pickle
import pickletools
import signal
import sys
import zipfile
from enum import Enum
from pathlib import Path

import pytest
import torch
from test_convert import hf_folder, run, tensors_of
from test_megatron_damage import Malice, foreign, save_as_megatron_does
from test_tiles import LLAMA
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from rlhf.errors import UserError
from rlhf.weights import files, pt
from rlhf.weights.formats import inspect
from rlhf.weights.formats.metadata import Metadata as Reader

FIXTURES = Path(__file__).parent / "fixtures"
ATTENTION = "megatron.core.transformer.enums.AttnBackend"
SPELLINGS = {
    "name": lambda member, _: (getattr, (type(member), member.name)),
    "value": lambda member, _: (type(member), (member.value,)),
}


def content() -> Metadata:
    """Return the metadata of a checkpoint with one tensor, and with the plan that Megatron-LM keeps in it."""
    size = torch.Size([2, 3])
    tensor = TensorStorageMetadata(
        TensorProperties(torch.bfloat16), size, [ChunkStorageMetadata(torch.Size([0, 0]), size)]
    )
    index = MetadataIndex("embedding.word_embeddings.weight", [0, 0])
    plan = SavePlan([WriteItem(index, WriteItemType.SHARD)])
    metadata = Metadata({index.fqn: tensor}, storage_data={index: _StorageInfo("__0_0.distcp", 0, 12)})
    metadata.all_local_plans = [plan]
    return metadata


def make(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Write both files, with enum members as this Python writes them."""
    backend = foreign(patch, ATTENTION)
    spelling = "name" if backend.__reduce_ex__(2)[0] is getattr else "value"
    (folder / f"enums-by-{spelling}.metadata").write_bytes(pickle.dumps(content()))
    args = argparse.Namespace(attention_backend=backend, exit_signal=signal.SIGTERM, num_layers=4)
    torch.save({"args": args, "iteration": 3}, folder / f"enums-by-{spelling}.pt")


def globals_of(pickled: bytes) -> set[str]:
    """Return the globals of a pickle of protocol 2.

    For later protocols, return its texts, which include the globals.
    """
    return {
        str(argument).replace(" ", ".") for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)
    }


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_another_python_wrote_is_read(spelling: str):
    path = FIXTURES / f"enums-by-{spelling}.metadata"
    assert ("getattr" in globals_of(path.read_bytes())) == (spelling == "name")
    assert vars(Reader(path).load()) == vars(content())
    path = FIXTURES / f"enums-by-{spelling}.pt"
    with zipfile.ZipFile(path) as archive:
        named = globals_of(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))
    assert ({"__builtin__.getattr", "signal.SIGTERM"} <= named) == (spelling == "name")
    tree = pt.read(path)
    assert (tree["iteration"], tree["args"].num_layers) == (3, 4)
    assert tree["args"].attention_backend.values == (("second",) if spelling == "name" else (2,))
    assert tree["args"].exit_signal.values == (("SIGTERM",) if spelling == "name" else (15,))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_checkpoints_of_either_spelling_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str):
    """This Python writes and reads them in both ways."""
    monkeypatch.setattr(Enum, "__reduce_ex__", SPELLINGS[spelling])
    wanted = hf_folder(tmp_path / "hf", LLAMA)
    run("--from", tmp_path / "hf", "--to", tmp_path / "sharded", "--format", "torch_dist", "--verify")
    assert ("getattr" in globals_of((tmp_path / "sharded/iter_0000001/.metadata").read_bytes())) == (spelling == "name")
    run("--from", tmp_path / "sharded", "--to", tmp_path / "back", "--format", "hf")
    got = tensors_of(tmp_path / "back")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    save_as_megatron_does(tmp_path / "core", monkeypatch, LLAMA, 102)
    files.open_folder(tmp_path / "core", LLAMA)


class Call(Malice):
    """A call in a pickle. Its function may be the result of another call."""

    def __call__(self) -> None: ...


def attribute(owner: object, *path: object) -> object:
    """Return what is getattr(getattr(owner, path[0]), path[1]) and so on after reading."""
    for name in path:
        owner = Call(getattr, owner, name)
    return owner


REFUSED = {
    "a class of a class": attribute(torch.Size, "__class__"),
    "a chain to every class": Call(attribute(torch.Size, "__class__", "__base__", "__subclasses__")),
    "a function of an allowed class": attribute(argparse.Namespace, "__init__", "__globals__"),
    "a method of an enum": attribute(WriteItemType, "mro"),
    "an enum's own attribute": attribute(WriteItemType, "_member_map_"),
    "a dunder name of an enum": attribute(WriteItemType, "__class__"),
    "a dotted name of an enum": attribute(WriteItemType, "SHARD.__class__"),
    "an attribute of a member": attribute(WriteItemType, "SHARD", "__class__"),
    "a module behind a function": attribute(getattr, "__self__", "eval"),
    "a method of a text": attribute("{0.__class__}", "format"),
    "no text as a name": attribute(WriteItemType, ("SHARD",)),
}


@pytest.mark.parametrize("asked", REFUSED.values(), ids=REFUSED)
def test_getattr_reaches_members_of_enums_only(tmp_path: Path, asked: object):
    for protocol in (2, 4):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(asked, protocol))
        with pytest.raises(UserError, match=r"\.metadata: it asks for .*: do not trust this file"):
            inspect(tmp_path)
    torch.save({"args": asked}, tmp_path / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt: it asks for .*: do not trust this file"):
        pt.read(tmp_path / "common.pt")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Call(getattr, WriteItemType, "none", asked)))  # with a default
    with pytest.raises(UserError, match=r"\.metadata: "):
        inspect(tmp_path)


@pytest.mark.parametrize("path", ["__subclasses__", "__class__", "_member_map_", "second.value", "second second", 7])
def test_getattr_of_a_stand_in_looks_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: object):
    """pt.py imports no class of Megatron, so names stay names. A name that no member has is refused too."""
    enum = type(foreign(monkeypatch, ATTENTION))
    torch.save({"args": attribute(enum, path)}, tmp_path / "common.pt")
    with pytest.raises(UserError, match="it asks for getattr"):
        pt.read(tmp_path / "common.pt")
    torch.save({"args": attribute(enum, "second", "values")}, tmp_path / "common.pt")
    with pytest.raises(UserError, match="it asks for getattr"):
        pt.read(tmp_path / "common.pt")


@pytest.mark.parametrize(
    "named",
    [
        "torch load",
        "torch serialization",
        "torch Size.__class__",
        "builtins getattr.__self__",
        "builtins eval",
        "os system",
    ],
)
def test_other_globals_are_refused(tmp_path: Path, named: str):
    path = tmp_path / ".metadata"
    path.write_bytes(b"\x80\x04c%s\n." % named.replace(" ", "\n").encode())
    with pytest.raises(UserError, match=rf"\.metadata: it asks for {named.replace(' ', '.')}, but only"):
        inspect(tmp_path)


def test_code_behind_getattr_is_not_executed(tmp_path: Path):
    mark = tmp_path / "executed"
    evil = Call(attribute(getattr, "__self__", "eval"), f"open({str(mark)!r}, 'w')")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(evil))
    torch.save({"args": evil}, tmp_path / "common.pt")
    with pytest.raises(UserError, match=r"it asks for getattr\(.*, '__self__'\)"):
        inspect(tmp_path)
    with pytest.raises(UserError, match=r"it asks for getattr\(.*, '__self__'\)"):
        pt.read(tmp_path / "common.pt")
    assert not mark.exists()


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        make(Path(sys.argv[1]), patch)

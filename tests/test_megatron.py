"""Megatron's checkpoint files are written as Megatron-LM writes them, and one iteration of several can be read."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from test_convert import ROOT, hf_folder, load, run
from test_tiles import FAMILIES, LLAMA, mcore_rank

from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.parallel import cpu
from rlhf.weights import files
from rlhf.weights.formats import FORMATS, Target, args, inspect, megatron, recognise

# Loads folders of mcore-local into megatron-core. Then asks what other installed versions would be refused with.
GPT_MODEL = """
import os, sys, torch
from rlhf.config import Parallel
from rlhf.parallel.mesh import Mesh
from rlhf.model import architecture
from rlhf.model.build import Decoder
mesh = Mesh(Parallel(), 1)
for folder in sys.argv[1:]:
    model = Decoder(architecture.read(folder), Parallel(), mesh, torch.float32)
    state = torch.load(folder + "/iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]
    assert not any(model.load_state_dict(state, strict=True))

# Installed versions that are others than ours: a name that a patch needs is gone, and an engine has one parameter more.
from types import SimpleNamespace
from rlhf import assemble, configuration
from rlhf.errors import UserError
from rlhf.model import megatron_private
from rlhf.rollout.kvcache import KVCache
def refused(call, *arguments):
    try:
        call(*arguments)
    except UserError as error:
        print(error)
keys = ["policy.load=" + folder, "rollout.engine=kvcache", "data.max_tokens=64", "rollout.max_tokens=32"]
config = configuration.load("grpo", keys)
given = SimpleNamespace(arch=architecture.read(folder))
held = assemble.build_engine(config, mesh, given, torch.float32).parameters()
KVCache.parameters = lambda self: held | {"model.scale": torch.zeros(1)}
refused(assemble.build_engine, config, mesh, given, torch.float32)
del megatron_private.mlp.bias_swiglu_impl
refused(megatron_private.install)
refused(megatron_private.define, megatron_private.layers, "no_extension", None)
refused(megatron_private.become, model.embedding, torch.nn.Linear)
sys.stdout.flush()
os._exit(0)
"""


def test_rewritten_bytecode_is_cached_apart_from_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is compiled again only if the source has changed. Other loaders do not get the rewritten code."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path, compiled = tmp_path / "where.py", []

    class Loader(cpu._Loader):
        def source_to_code(self, *arguments, **options):
            compiled.append(path.read_text())
            return super().source_to_code(*arguments, **options)

    def device(loader: type[SourceFileLoader]) -> str:
        module = ModuleType("where")
        exec(loader("where", str(path)).get_code("where"), module.__dict__)
        return module.DEVICE

    path.write_text('DEVICE = "cuda"')
    assert [device(loader) for loader in (Loader, Loader, SourceFileLoader, Loader)] == ["cpu", "cpu", "cuda", "cpu"]
    assert compiled == ['DEVICE = "cuda"']
    path.write_text('DEVICE = "cuda"  # changed')
    assert [device(loader) for loader in (SourceFileLoader, Loader)] == ["cuda", "cpu"]
    assert len(compiled) == 2


def test_legacy_files_are_nested_padded_and_described_as_megatrons(tmp_path: Path):
    arch = replace(LLAMA, kv_heads=2, family="qwen2", rope_theta=1e6)
    wanted = hf_folder(tmp_path / "hf", arch)
    options = "--format legacy --tp 2 --pp 2 --iteration 7 --dtype fp16"
    run("--from", tmp_path / "hf", "--to", tmp_path / "old", *options.split())
    assert (tmp_path / "old" / megatron.TRACKER).read_text() == "7"
    folders = sorted(path.name for path in (tmp_path / "old/iter_0000007").iterdir())
    assert folders == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    tree = load(tmp_path / "old/iter_0000007/mp_rank_01_001/model_optim_rng.pt")
    assert (tree["checkpoint_version"], tree["iteration"]) == (3.0, 7)
    model = tree["model"]["language_model"]
    assert model.keys() == {"encoder", "output_layer"}
    assert model["output_layer"]["_extra_state"] is None
    states = model["encoder"].items()
    layer = {name.removeprefix("layers.1."): state for name, state in states if name.startswith("layers.1.")}
    linears = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    tensors = {
        "input_norm.weight",
        "post_attention_norm.weight",
        "self_attention.query_key_value.bias",
        *(f"{x}.weight" for x in linears),
    }
    assert layer.keys() == tensors | {f"{linear}._extra_state" for linear in linears}
    prefix = "model.layers.3."  # the second layer of the second stage
    gate, up = (wanted[f"{prefix}mlp.{x}_proj.weight"].half().chunk(2)[1] for x in ("gate", "up"))
    assert torch.equal(layer["mlp.dense_h_to_4h.weight"], torch.cat([gate, up]))
    assert torch.equal(model["encoder"]["final_norm.weight"], wanted["model.norm.weight"].half())
    head = wanted["lm_head.weight"].half()
    rows = head[-1:].expand(256 - 101, -1)  # 101 is not divisible by 2: copies of the last row pad it to 128 x 2
    assert torch.equal(model["output_layer"]["weight"], torch.cat([head, rows])[128:])
    args = tree["args"]
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.num_attention_heads) == (4, 32, 48, 8)
    assert (args.group_query_attention, args.num_query_groups, args.kv_channels) == (True, 2, 8)
    assert args.add_qkv_bias
    assert (args.rotary_base, args.norm_epsilon, args.normalization, args.swiglu) == (1000000, 1e-5, "RMSNorm", True)
    assert (args.padded_vocab_size, args.make_vocab_size_divisible_by) == (256, 128)
    assert args.untie_embeddings_and_output_weights
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert (args.params_dtype, args.fp16, args.bf16) == (torch.float16, True, False)


def test_a_tied_table_is_copied_to_the_last_stage(tmp_path: Path):
    wanted = hf_folder(tmp_path / "hf", replace(LLAMA, tied=True, vocab=128))["model.embed_tokens.weight"]
    for format, key in (("legacy", "word_embeddings_for_head.weight"), ("mcore", "output_layer.weight")):
        run("--from", tmp_path / "hf", "--to", tmp_path / format, "--format", format, "--pp", 2)
        first, last = inspect(tmp_path / format).shards
        assert key in last
        assert key not in first
        tree = load(tmp_path / format / "iter_0000001/mp_rank_00_001/model_optim_rng.pt")["model"]
        held = tree["word_embeddings_for_head"]["weight"] if format == "legacy" else tree[key]
        assert torch.equal(held, wanted)


def test_a_core_checkpoint_is_the_state_of_a_gpt_model(tmp_path: Path):
    """The names are those of mcore-local.

    The state is exactly what a megatron-core model without Transformer Engine saves and loads.
    """
    folders = []
    for family in ("gqa", "tied, head_dim apart", "qk norm"):
        arch = replace(FAMILIES[family], vocab=128)
        folders.append(tmp_path / f"core {family}")
        hf_folder(tmp_path / family, arch, torch.float32)
        run("--from", tmp_path / family, "--to", folders[-1], "--format", "mcore-local")
        state = load(folders[-1] / "iter_0000001/mp_rank_00/model_optim_rng.pt")["model"]
        wanted = mcore_rank(arch, load_file(tmp_path / family / "model.safetensors"), (0, 1), (0, 1))
        held = {name: value for name, value in state.items() if value is not None}
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[name], wanted[name]) for name in held)
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29655",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", GPT_MODEL, *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    engine, name, extension, kind = done.stdout.splitlines()
    assert engine.startswith(
        "rollout.engine=kvcache: the installed version has other parameters than expected "
        "(it also has model.scale): install"
    )
    assert re.match(
        r"megatron-core \S+: megatron.core.transformer.mlp has no bias_swiglu_impl, "
        r"but rlhf replaces or reads it: install",
        name,
    )
    assert "megatron.core.tensor_parallel.layers has no use of no_extension" in extension
    assert kind.startswith("megatron-core builds a LanguageModelEmbedding, which cannot become a Linear: install")


def test_one_iteration_of_several(tmp_path: Path, capsys: pytest.CaptureFixture):
    """--iteration selects it, also without a tracker file.

    Its own folder can be read too, with the config.json beside it.
    """
    arch = replace(LLAMA, rope_theta=5e5)
    hf_folder(tmp_path / "hf", arch)
    for format in ("legacy", "torch_dist"):
        run("--from", tmp_path / "hf", "--to", tmp_path / format, "--format", format, "--iteration", 6)
        assert files.read_architecture(tmp_path / format / "iter_0000006") == arch
        (tmp_path / format / megatron.TRACKER).unlink()
        (tmp_path / format / "config.json").unlink()
        run("--from", tmp_path / format, "--to", tmp_path / f"{format}-hf", "--format", "hf", "--iteration", 6)
        assert architecture.read(tmp_path / f"{format}-hf") == arch


def test_iterations_of_several_formats(tmp_path: Path):
    """Each iteration is read in its own format. The tracker file, the number or the folder selects the iteration."""
    hf_folder(tmp_path / "hf", LLAMA)
    folder = tmp_path / "both"
    for iteration, format in enumerate(("torch_dist", "legacy", "mcore"), 1):
        run("--from", tmp_path / "hf", "--to", tmp_path / format, "--format", format, "--iteration", iteration)
        name = f"iter_{iteration:07}"
        (tmp_path / format / name).rename(folder.joinpath(name)) if folder.exists() else (tmp_path / format).rename(
            folder
        )
        assert inspect(folder, iteration).format == inspect(folder / name).format == format
    assert inspect(folder).format == "torch_dist"  # the tracker file is from this one
    (folder / megatron.TRACKER).write_text("2")
    assert inspect(folder).format == "legacy"
    assert recognise(tmp_path / "hf").name == recognise(tmp_path / "nowhere").name == "hf"


@pytest.mark.parametrize(
    ("text", "message"), [("9" * 5000, "is neither a number nor release"), ("3", "no folder iter_0000003; there are")]
)
def test_a_tracker_file_alone(tmp_path: Path, text: str, message: str):
    (tmp_path / megatron.TRACKER).write_text(text)
    with pytest.raises(UserError, match=message):
        inspect(tmp_path)


def test_args_pad_the_vocabulary_as_the_file_does():
    """Megatron-LM computes the number of rows from make_vocab_size_divisible_by."""
    for vocab, divisor, tp in ((101, 0, 1), (101, 0, 2), (32000, 0, 4), (101, 200, 1), (101, 24, 2), (128256, 1, 8)):
        arch = replace(LLAMA, vocab=vocab)
        target = Target(FORMATS["legacy"], arch, torch.float32, tp=tp, divisor=divisor)
        unit = tp * args.describe(target)["make_vocab_size_divisible_by"]
        assert -(-vocab // unit) * unit == target.rows

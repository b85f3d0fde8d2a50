"""Folders of safetensors: wrong ones are refused by name, boxes are read bitwise, and open_folder() needs no torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_megatron_damage import save_as_megatron_does
from test_tiles import FAMILIES, LLAMA, blank, mcore_rank, random_hf

from rlhf.config import Checkpoint
from rlhf.errors import UserError
from rlhf.parallel.layout import Place
from rlhf.weights import export, files, initial, names
from rlhf.weights.formats import FORMATS, args
from rlhf.weights.names import tilings


def save(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    num_files: int = 1,
    write: Callable[[Any, Path], object] = save_file,
    single: str = "model.safetensors",
) -> None:
    """Write the weights of a Hugging Face folder: one file with the name `single`, or several and an index."""
    if num_files == 1:
        write(tensors, folder / single)
        return
    stem, suffix = single.split(".")
    titles = {name: f"{stem}-{i % num_files + 1:05}-of-{num_files:05}.{suffix}" for i, name in enumerate(tensors)}
    for title in set(titles.values()):
        write({name: tensors[name] for name in tensors if titles[name] == title}, folder / title)
    (folder / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": titles}))


def check_boxes(folder: Path, arch, hf: dict[str, torch.Tensor]) -> None:
    """Check that each of four ranks (TP2 x PP2) reads its boxes of these tensors from the folder."""
    as_float = {name: tensor.float() for name, tensor in hf.items()}
    for rank, tiling in enumerate(tilings(arch, "megatron", 4, 2, 2)):
        wanted = mcore_rank(arch, as_float, (rank % 2, 2), (rank // 2, 2))
        got = blank([wanted])[0]
        files.read(folder, arch, tiling, got)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("arch", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("num_files", [1, 3])
def test_each_rank_reads_its_boxes(tmp_path: Path, arch, num_files: int):
    hf = {name: tensor.bfloat16() for name, tensor in random_hf(arch).items()}
    save(tmp_path, hf, num_files)
    files.open_folder(tmp_path, arch)
    check_boxes(tmp_path, arch, hf)


def test_stored_tensors_are_transformed_as_a_whole(tmp_path: Path):
    hf = random_hf(LLAMA)
    save(tmp_path, hf)

    def scaled(local: str, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.shape == hf[local].shape
        return 3 * tensor if "_proj" in local else tensor

    source, tiling = files.open_folder(tmp_path, LLAMA), names.tiles(LLAMA, "megatron", Place((1, 2), (0, 2)))
    wanted = mcore_rank(LLAMA, {name: scaled(name, tensor) for name, tensor in hf.items()}, (1, 2), (0, 2))
    got = blank([wanted])[0]
    source.read(tiling, got, scaled)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_formats_are_those_of_the_key():
    (choices, _) = get_args(get_type_hints(Checkpoint)["format"])
    assert get_args(choices) == tuple(FORMATS)


def test_random_weights_are_of_seed_and_name():
    """They depend on the seed and the tensor's name only, not on the device or the layout."""
    tiling = names.tiles(LLAMA, "hf")

    def made(seed: int) -> dict[str, torch.Tensor]:
        tensors = {name: torch.empty(shape) for name, shape in names.hf_shapes(LLAMA).items()}
        initial.fill(LLAMA, tiling, tensors, seed)
        return {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}

    first, second, again = made(1), made(2), made(1)
    corners = [float(tensor[0, 0]) for tensors in (first, second) for tensor in tensors.values()]
    assert len(set(corners)) == 2 * len(first)
    assert all(torch.equal(first[name], again[name]) for name in first)
    fused = replace(LLAMA, family="phi3")
    tensors = {name: torch.empty(shape) for name, shape in names.hf_shapes(fused).items()}
    initial.fill(fused, names.tiles(fused, "hf"), tensors, 1)
    for parts, whole in (("qkv", "self_attn.qkv_proj.weight"), (("gate", "up"), "mlp.gate_up_proj.weight")):
        prefix = f"model.layers.3.{whole.split('.')[0]}."
        assert torch.equal(
            tensors[f"model.layers.3.{whole}"], torch.cat([first[f"{prefix}{x}_proj.weight"] for x in parts])
        )


def test_check_does_without_torch(tmp_path: Path):
    save(tmp_path, random_hf(LLAMA))
    script = (
        "import sys; from rlhf.weights import files; from rlhf.model.architecture import Architecture\n"
        f"files.open_folder({str(tmp_path)!r}, {LLAMA!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


def test_what_may_be_extra(tmp_path: Path):
    tied = replace(LLAMA, tied=True)
    hf = random_hf(tied)
    save(
        tmp_path,
        hf
        | {
            "lm_head.weight": hf["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
    )
    files.open_folder(tmp_path, tied)


@pytest.mark.parametrize("lm", [False, True])
def test_a_causal_model_serves_as_a_scalar_one(tmp_path: Path, lm: bool):
    save(tmp_path, random_hf(LLAMA))
    arch = replace(LLAMA, scalar=True, lm=lm)
    files.open_folder(tmp_path, arch)
    with pytest.raises(UserError, match=r"no scalar head \(score\.weight\): it is no reward model"):
        files.open_folder(tmp_path, arch, head=True)
    for rank, tiling in enumerate(tilings(arch, "megatron", 4, 2, 2)):
        got = {tile.local: torch.full((9999, 32), torch.nan) for tile in tiling if tile.name == "score.weight"}
        files.read(tmp_path, arch, [tile for tile in tiling if tile.name == "score.weight"], got)
        assert len(got) == rank // 2, "the head is on the last stage"
        assert all((tensor[0] == 0).all() and tensor[1].isnan().all() for tensor in got.values())
        assert any(tile.name == "lm_head.weight" for tile in tiling) == (lm and rank // 2 == 1)


def edit(change):
    """Return an edit of the tensors in a folder's single file."""
    return lambda folder: save(folder, change(random_hf(LLAMA)))


def cut(size: int):
    """Return a cut of a folder's single file after `size` bytes (negative: that many bytes before its end)."""

    def make(folder: Path) -> None:
        save(folder, random_hf(LLAMA))
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return make


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 13476839\n"
    )


def spoilt(old: bytes, new: bytes):
    """Return a change of the header in a folder's single file."""

    def make(folder: Path) -> None:
        save(folder, random_hf(LLAMA))
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(old, new, 1))

    return make


def unlisted(folder: Path) -> None:
    save(folder, random_hf(LLAMA), num_files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


NORM = "model.norm.weight"
MISTAKES = {
    "empty folder": (lambda folder: None, r"no model\*\.safetensors or pytorch_model\*\.bin file"),
    "data cut short": (
        cut(-1),
        r"model.safetensors: damaged, .* \(.*file not fully covered; \d+ bytes\); download it again",
    ),
    "header cut short": (
        cut(100),
        r"model.safetensors: damaged, .* \(.*invalid header length; 100 bytes\)",
    ),
    "nothing in it": (cut(0), r"model.safetensors: damaged, .* \(.*header too small; 0 bytes\)"),
    "git-lfs pointer": (
        pointer,
        r"model.safetensors: a pointer of git-lfs, not the file itself; fetch the file: git lfs pull",
    ),
    "a header of other things": (
        spoilt(b'"data_offsets"', b'"data_0ffsets"'),
        r"not a safetensors file \(.*missing field `data_offsets`",
    ),
    "a tensor in the header": (
        spoilt(b'"data_offsets":[0,', b'"data_offsets":[-8,'),
        r"not a safetensors file \(.*integer `-8`",
    ),
    "an index of other things": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        r"index.json: damaged, or not an index of the files of weights \(AttributeError",
    ),
    "fewer bytes than the shape asks for": (
        spoilt(b'"F32"', b'"F16"'),
        "not a safetensors file .*invalid shape, data type, or offset",
    ),
    "a shard missing": (
        unlisted,
        r"model-00002-of-00003.safetensors: missing, but model.safetensors.index.json lists it",
    ),
    "a tensor missing": (
        edit(lambda hf: {k: v for k, v in hf.items() if k != NORM}),
        "tensor model.norm.weight is missing",
    ),
    "a wrong shape": (
        edit(lambda hf: hf | {NORM: torch.ones(31)}),
        r"model.norm.weight has shape \[31\], but config.json asks for \[32\]",
    ),
    "a wrong dtype": (
        edit(lambda hf: hf | {NORM: hf[NORM].to(torch.float8_e4m3fn)}),
        "has dtype F8_E4M3; supported are F32, F16, BF16",
    ),
    "a tensor too many": (
        edit(lambda hf: hf | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        "tensors model.layers.0.self_attn.q_proj.bias are not part of a llama model",
    ),
    "another's reward head": (
        edit(lambda hf: hf | {"pooler_head.dense1.weight": torch.ones(32, 32)}),
        r"a reward head of two layers \(pooler_head\).* train a reward model with mode reward",
    ),
}


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_wrong_folders_are_refused(tmp_path: Path, make, message: str):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        files.open_folder(tmp_path, LLAMA)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_one_rank_writes_what_safetensors_reads(tmp_path: Path):
    hf = random_hf(LLAMA)
    sources = tilings(LLAMA, "megatron", 1, 1)
    parameters = mcore_rank(LLAMA, hf, (0, 1), (0, 1))
    export.write(tmp_path, LLAMA, {"dtype": "float32"}, sources, parameters, rank=0, nodes=[0], dtype=torch.bfloat16)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == hf.keys()
    assert all(torch.equal(written[name], hf[name].bfloat16()) for name in hf)
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": "bfloat16"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_odd_args_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {name: f"its args have {name} 0.5, which is not supported" for name in args.UNSEEN}
    wanted |= {name: f"args.{name} '0.5' is not a number" for name in args.NUMBERS}
    wanted |= {
        "num_layers": "args.num_layers '0.5' is not a whole number",
        "tensor_model_parallel_size": "damaged, or not a checkpoint",
    }
    for name, message in wanted.items():
        save_as_megatron_does(tmp_path / name, monkeypatch, LLAMA, 102, **{name: "0.5"})
        with pytest.raises(UserError, match=f"iter_0000003: {message}"):
            files.read_architecture(tmp_path / name)


def test_an_embedding_that_is_no_matrix_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_as_megatron_does(tmp_path, monkeypatch, LLAMA, 102)
    first, name = tmp_path / "iter_0000003/mp_rank_00/model_optim_rng.pt", "embedding.word_embeddings.weight"
    tree = torch.load(first, weights_only=False)
    tree["model"][name] = torch.tensor(1.0)
    torch.save(tree, first)
    with pytest.raises(UserError, match=f"iter_0000003: no matrix {name} in the first rank file"):
        files.open_folder(tmp_path, LLAMA)


def test_a_folder_without_config_json_gets_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_as_megatron_does(tmp_path, monkeypatch, LLAMA, 102)
    [remark] = files.open_folder(tmp_path, LLAMA).remarks(LLAMA, "", "policy.tokenizer")
    assert remark.startswith(
        f"{tmp_path} has no config.json: rotary_base 10000 and all other values are those of its args; "
        "if they are wrong, set policy.tokenizer to a folder with config.json"
    )

"""Which properties of a model Megatron's args contain, and which they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_convert import MODELS, hf_folder, run
from test_megatron_damage import save_as_megatron_does
from test_tiles import LLAMA

from rlhf.errors import UserError
from rlhf.weights import files
from rlhf.weights.formats import hf


def test_args_say_what_no_tensor_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rope scaling is read. Args that would mean another computation than ours are refused."""
    save_as_megatron_does(tmp_path / "core", monkeypatch, LLAMA, 102, use_rope_scaling=True, rope_scaling_factor=32.0)
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert files.read_architecture(tmp_path / "core") == replace(LLAMA, rope_scaling=scaling)
    save_as_megatron_does(tmp_path / "window", monkeypatch, LLAMA, 102, window_size=(8, 0))
    assert files.read_architecture(tmp_path / "window") == replace(LLAMA, family="mistral", window=9)
    for args, said in (
        ({"window_size": (8, 8)}, r"window_size \(8, 8\), but only \(tokens, 0\) is supported"),
        (
            {"window_size": (8, 0), "qk_layernorm": True},
            r"qk_layernorm True, window_size \(8, 0\), but no supported family has this combination",
        ),
    ):
        save_as_megatron_does(tmp_path / str(args), monkeypatch, LLAMA, 102, **args)
        with pytest.raises(UserError, match=f"its args have {said}"):
            files.read_architecture(tmp_path / str(args))
    for name, value in (
        ("apply_layernorm_1p", True),
        ("rotary_interleaved", True),
        ("rotary_percent", 0.5),
        ("window_attn_skip_freq", 2),
    ):
        save_as_megatron_does(tmp_path / name, monkeypatch, LLAMA, 102, **{name: value})
        with pytest.raises(UserError, match=f"iter_0000003: its args have {name} {value}, which is not supported"):
            files.open_folder(tmp_path / name, LLAMA)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "linear", "factor": 4.0}, True),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 8,
                "truncate": False,
            },
            True,
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 2.0,
                "mscale_all_dim": 1.0,
            },
            True,
        ),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 2.0}, False),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            False,
        ),
    ],
)
def test_rope_scaling_in_args(tmp_path: Path, capsys: pytest.CaptureFixture, scaling: dict, said: bool):
    """Some scalings can be stored in args.

    The others are read from config.json only, and the user gets a message.
    """
    arch = replace(LLAMA, rope_scaling=scaling)
    hf_folder(tmp_path / "hf", arch)
    run("--from", tmp_path / "hf", "--to", tmp_path / "core", "--format", "mcore")
    assert ("Megatron's args cannot express all of the rope scaling" in capsys.readouterr().err) != said
    assert files.read_architecture(tmp_path / "core") == arch
    (tmp_path / "core/config.json").write_text(json.dumps(hf.description(replace(arch, rope_scaling={}))))
    run("--from", tmp_path / "core", "--to", tmp_path / "plain", "--format", "hf")
    assert "its args have rope scaling {'rope_type'" in capsys.readouterr().err
    (tmp_path / "core/config.json").unlink()
    assert (files.read_architecture(tmp_path / "core") == arch) == said


def test_args_that_ask_for_yarn_have_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_as_megatron_does(tmp_path / "core", monkeypatch, LLAMA, 102, position_embedding_type="yarn")
    with pytest.raises(UserError, match=r"args\.yarn_rotary_scaling_factor None is not a number above 0"):
        files.open_folder(tmp_path / "core", LLAMA)


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("format", ["legacy", "mcore"])
def test_args_alone_tell_what_the_model_is(tmp_path: Path, arch, format: str, capsys: pytest.CaptureFixture):
    """Args contain neither pad token nor family. Fused files are read as the first family that computes the same."""
    hf_folder(tmp_path / "hf", arch)
    told = replace(arch, family="mistral" if arch.row.files else arch.family, pad=None)
    for pp in (1, 2):
        run("--from", tmp_path / "hf", "--to", tmp_path / f"{pp}", "--format", format, "--pp", pp)
        (tmp_path / f"{pp}/config.json").unlink()
        assert ("cannot express pad_token_id 2" in capsys.readouterr().err) == (arch.pad == 2)
        assert files.read_architecture(tmp_path / f"{pp}") == told

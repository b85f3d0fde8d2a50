"""Models that are damaged or not supported are reported in one line, with exit code 2, before any rank starts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import demo_task
import pytest
import torch
from safetensors.torch import save_file

from rlhf import shapes
from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.weights import names

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM is not supported", "LlamaForCausalLM"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, ["'longrope' is not supported for llama"]),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            ["'yarn' is not supported for phi3"],
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "alpha": 2.0}},
            ["rope scaling dynamic with 'alpha' is not supported"],
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": "1"}}, ["mscale '1' is not a number above 0"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["key 'factor' is missing"]),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 0},
            ["sliding_window 0 is not a whole number above 0"],
        ),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"hidden_act": "gelu"}, ["'gelu'"]),
        *(({key: {}}, ["quantized"]) for key in ("quantization_config", "compression_config", "quantization")),
        ({"architectures": None}, ["key architectures is missing; add the class that was saved"]),
        ({"architectures": ["BertForMaskedLM"]}, ["BertForMaskedLM is not supported"]),
        ({"architectures": ["LlamaModel"]}, ["LlamaModel is not supported"]),
        ({"transformers_weights": "other.safetensors"}, ["'other.safetensors' is not supported; rename this file"]),
        ({"vocab_size": 16}, ["vocab_size=16"]),
        ({"num_attention_heads": 0}, ["num_attention_heads 0 is not a whole number above 0"]),
        ({"num_hidden_layers": "2"}, ["num_hidden_layers '2' is not a whole number above 0"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps '1e-5' is not a number"]),
        ({"rope_scaling": 2}, ["not a valid config.json of a model"]),
        ({"rms_norm_eps": math.nan}, ["rms_norm_eps nan is not a number above 0"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps -1e-05 is not a number above 0"]),
        ({"rms_norm_eps": True}, ["rms_norm_eps True is not a number above 0"]),
        ({"rope_theta": 0}, ["rope_theta 0 is not a number above 0"]),
        ({"rope_theta": 10**400}, ["rope_theta 1000", "is not a number above 0"]),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, ["factor 0 is not a number above 0"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, ["low_freq_factor 4 is not below"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers 1000000000", "up to 4096"]),
        ({"vocab_size": 10**30}, ["vocab_size 1000", "up to 2147483647"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads 0 is not"]),
        ({"head_dim": 31}, ["head_dim 31 is not even"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings 'false' is neither true nor false"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5 is not supported"]),
        ({"architectures": [[1]]}, ["not a valid config.json of a model"]),
    ],
)
def test_config_json(fail, made: Path, tmp_path: Path, changes: dict, wanted: list[str]) -> None:
    (tmp_path / "tokenizer.model").write_bytes((made / "model/tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL | changes))
    line = fail("sft", f"policy.load={tmp_path}")
    assert str(tmp_path / "config.json") in line
    assert all(part in line for part in wanted), line


QUANTIZED = "its weights are quantized"
KINDS = [  # name of a file, its content, whether a config.json is beside it, the message
    ("adapter_config.json", {"base_model_name_or_path": "a/b"}, True, ['adapter of "a/b"', "AutoPeftModelForCausalLM"]),
    ("adapter_config.json", {"task_type": "SEQ_CLS"}, False, ["AutoPeftModelForSequenceClassification", "-merged')"]),
    ("adapter_config.json", [], True, ["not the description of an adapter"]),
    ("quantize_config.json", {"bits": 4}, True, [QUANTIZED]),
    ("quant_config.json", {"w_bit": 4}, True, [QUANTIZED]),
    ("config_sentence_transformers.json", {}, True, ["a sentence-transformers model"]),
    ("model_index.json", {}, False, ["a diffusers pipeline"]),
    ("llama.gguf", {}, False, ["llama.gguf: weights in GGUF"]),
    ("consolidated.00.pth", {}, False, ["weights in Meta's own format", "-hf"]),
    ("consolidated.safetensors", {}, False, ["weights in Mistral's own format"]),
    ("snapshots/0123/config.json", {}, False, ["of the Hugging Face cache; give {folder}/snapshots/0123"]),
    ("other.txt", {}, False, ["config.json: No such file"]),
]


@pytest.mark.parametrize(("name", "content", "described", "wanted"), KINDS)
def test_folders_of_other_kinds(
    fail, tmp_path: Path, name: str, content: object, described: bool, wanted: list[str]
) -> None:
    if described:
        (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
    line = fail("grpo", f"reward.load={tmp_path}")
    assert str(tmp_path) in line
    assert all(part.format(folder=tmp_path) in line for part in wanted), line


@pytest.mark.parametrize(("name", "wanted"), [("a.gguf", "GGUF"), ("a.safetensors", "a file; give the folder that")])
def test_a_file_is_no_folder(fail, tmp_path: Path, name: str, wanted: str) -> None:
    (tmp_path / name).write_text("")
    assert f"{tmp_path / name}: {wanted}" in fail("sft", f"policy.load={tmp_path / name}").replace("weights in ", "")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"head_dim": 48}, "has a head_dim of 48, but vLLM on a CPU supports only 32, 64"),
        ({"seq_length": 64}, "data.max_tokens=128 is larger than the context length 64 of"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "has the rope scaling factor 2, but vLLM needs 2.0"),
        ({"model_type": "gpt2"}, "has model_type 'gpt2', but vLLM needs 'llama'"),
    ],
)
def test_what_vllm_would_refuse(fail, made: Path, tmp_path: Path, changes: dict, wanted: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((made / "model/tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL | changes))
    assert wanted in fail("grpo", f"policy.load={tmp_path}")


@pytest.mark.parametrize(
    "changes", [{"rope_parameters": []}, {"tie_word_embeddings": 1}, {"hidden_size": 130}, {"torch_dtype": "nonsense"}]
)
def test_what_transformers_would_refuse(made: Path, tmp_path: Path, changes: dict) -> None:
    """vLLM reads config.json with transformers, which is stricter than this program."""
    (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL | changes))
    architecture.read(tmp_path)
    with pytest.raises(
        UserError,
        match=f"^{tmp_path}/config.json: transformers, which vLLM reads it with, refuses it: .*; use the file",
    ):
        shapes.readable(str(tmp_path))
    assert shapes.readable(f"{made}/model") == f"{made}/model"


@pytest.mark.parametrize("mode", ["grpo", "evaluate"])
def test_a_reward_model_needs_its_head(fail, made: Path, tmp_path: Path, mode: str) -> None:
    """A language model as reward model would score everything 0.

    A model that is trained may begin with a head of zeros.
    """
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((made / "model" / name).read_bytes())
    demo_task.make_weights(tmp_path)
    load = ("policy.init=load", f"reward.load={tmp_path}", f"data.eval={made}/data/heldout.jsonl")
    assert f"{tmp_path} has no scalar head" in fail(mode, *load, f"policy.load={tmp_path}")
    assert f"{made}/model: no model*.safetensors or pytorch_model*.bin file" in fail(mode, *load)


def test_windows(fail, tmp_path: Path) -> None:
    """Beyond the window of some layers, other programs differ in which layers have it."""
    window = {"sliding_window": 64, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL | window))
    said = f"data.max_tokens=128 is larger than the sliding_window of some layers, which is 64 of {tmp_path}: lower it"
    assert said in fail("sft", f"policy.load={tmp_path}")


def test_a_window_that_is_not_used_is_not_named(fail, tmp_path: Path) -> None:
    """Qwen2's config.json has the context length as sliding_window, too."""
    kind = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
    sizes = {"sliding_window": 64, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL | kind | sizes))
    said = f"data.max_tokens=128 is larger than the context length 64 of {tmp_path}: lower it"
    assert said in fail("sft", f"policy.load={tmp_path}")


def test_every_model_reads_whole_texts(fail, made: Path, tmp_path: Path) -> None:
    """A reward model with a shorter context than the policy's would score positions on which it was not trained."""
    (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL | {"max_position_embeddings": 64}))
    assert f"data.max_tokens=128 is larger than the context length 64 of {tmp_path}" in fail(
        "grpo", f"reward.load={tmp_path}"
    )


def test_safetensors(fail, made: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((made / "model" / name).read_bytes())
    load = ("policy.init=load", f"policy.load={tmp_path}")
    assert "safetensors" in fail("sft", *load)
    shapes = names.hf_shapes(architecture.read(tmp_path))
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors" in fail("sft", *load)
    save_file({name: torch.zeros(shape) for name, shape in list(shapes.items())[1:]}, path)
    assert next(iter(shapes)) in fail("sft", *load)
    save_file({name: torch.zeros(*shape, 2) for name, shape in shapes.items()}, path)
    assert "shape" in fail("sft", *load)


def test_tensors_that_share_bytes(fail, made: Path, tmp_path: Path) -> None:
    """Tensors of equal shapes: bytes must not be used twice, be unused, or lie behind the end of the file."""
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((made / "model" / name).read_bytes())
    demo_task.make_weights(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    norm, other = (f"model.layers.{i}.input_layernorm.weight" for i in range(2))

    def said(changed: dict, data: bytes) -> str:
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return fail("sft", "policy.init=load", f"policy.load={tmp_path}")

    assert "invalid offset for tensor" in said(header | {norm: header[other]}, content[start:])
    assert "file not fully covered" in said(header, content[start:] + b"0000")
    moved = {
        name: at | {"data_offsets": [x + 4 for x in at["data_offsets"]]} for name, at in header.items() if "dtype" in at
    }
    assert "invalid offset for tensor" in said(moved, b"0000" + content[start:])


def test_an_index_names_files_of_its_folder(fail, made: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((made / "model" / name).read_bytes())
    for title in ("../model/model.safetensors", "/etc/passwd", "a\0b", "a" * 300):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": title}}))
        assert "is not the name of a file in this folder" in fail("sft", "policy.init=load", f"policy.load={tmp_path}")

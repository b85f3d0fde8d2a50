"""Names folders of other kinds, which cannot be loaded as a model, and says what to do. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf import folders, texts
from rlhf.errors import UserError
from rlhf.weights.entries import intact

ORIGINAL = (
    "download it in Hugging Face's format: the same name with -hf, or the files config.json and model*.safetensors"
)
# Pattern of a file's name -> what the folder is, and the remedy. Such a folder is refused, even with a config.json.
KINDS = {
    "quantize_config.json": "its weights are quantized (GPTQ); give the folder with bfloat16 or float32 weights",
    "quant_config.json": "its weights are quantized (AWQ); give the folder with bfloat16 or float32 weights",
    "config_sentence_transformers.json": "a sentence-transformers model, which embeds texts; give a language model",
    "model_index.json": "a diffusers pipeline, which makes images; give a language model",
}
# The same for folders without config.json, or without weights in a supported format.
INCOMPLETE = {
    "*.gguf": "weights in GGUF; give the Hugging Face folder from which they were made",
    "consolidated*.pth": f"weights in Meta's own format; {ORIGINAL}",
    "consolidated*.safetensors": f"weights in Mistral's own format; {ORIGINAL}",
    "snapshots/*/config.json": "a folder of the Hugging Face cache; give {first}",
}
MERGE = (
    'python -c "from peft import AutoPeftModelFor{task} as M; '
    "M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged')\""
)


def check(folder: Path) -> None:
    """Raise UserError if the folder has files of another kind, even beside a config.json."""
    if (adapter := folder / "adapter_config.json").exists():
        raise UserError(_adapter(folder, adapter))
    for pattern, what in KINDS.items():
        if (folder / pattern).exists():
            raise UserError(f"{folder / pattern}: {what}")


def explain(folder: Path) -> None:
    """Raise UserError if it is known what a folder without config.json or weights is, or what a missing one means."""
    if not folder.exists():
        remedy = texts.download(str(folder)) or "give the folder of a model in Hugging Face or Megatron format"
        raise UserError(f"{folder}: no such folder; {remedy}")
    if not folder.is_dir():
        what = INCOMPLETE["*.gguf"] if folder.suffix == ".gguf" else "a file; give the folder that contains it"
        raise UserError(f"{folder}: {what}")
    for pattern, what in INCOMPLETE.items():
        if found := sorted(folder.glob(pattern)):
            raise UserError(f"{found[0]}: {what.format(first=found[0].parent)}")
    if folders.steps(folder) or folders.NAME.fullmatch(folder.name):
        remedy = "let the run reach its last step, which exports the model, or set checkpoint.export=true there"
        raise UserError(f"{folder}: of a run, but it has no complete export; {remedy}")


def _adapter(folder: Path, path: Path) -> str:
    """Return the message for the folder of a LoRA adapter."""
    with intact(path, "the description of an adapter"):
        config = texts.load(path, "copy it again")
        task = "SequenceClassification" if config.get("task_type") == "SEQ_CLS" else "CausalLM"
        base = json.dumps(config.get("base_model_name_or_path"))
    merge = MERGE.format(task=task, folder=folder)
    return f"{path}: a LoRA adapter of {base:.200}; merge it into that model, and give the new folder: {merge}"

"""Builds the parts around a vocabulary, as those classes of transformers 5 do that ignore them in a tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in the pieces of sentencepiece
# the pattern of transformers, models/qwen2/tokenization_qwen2.py
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _llama(backend: Backend, values: Mapping[str, Any]) -> None:
    prefix = values.get("add_prefix_space")
    scheme = "never" if prefix is False else "always" if values.get("legacy") else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    backend.decoder = spaced(prefix is not False)


def _code_llama(backend: Backend, values: Mapping[str, Any]) -> None:
    _llama(backend, {**values, "legacy": False})  # this class has no such setting
    backend.decoder = spaced(True)


def spaced(prefix: bool) -> decoders.Decoder:
    """Return the decoder of pieces with SPACE. prefix: texts were encoded with a space before them."""
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)


def _qwen2(backend: Backend, values: Mapping[str, Any]) -> None:
    prefix = bool(values.get("add_prefix_space"))
    split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(prefix, use_regex=False)])
    backend.decoder = decoders.ByteLevel()


def _gpt2(backend: Backend, values: Mapping[str, Any]) -> None:
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(bool(values.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()


# Classes of transformers -> function that sets the parts around the model. Each is that of the class's __init__.
PARTS: dict[str, Callable[[Backend, Mapping[str, Any]], None]] = {
    "LlamaTokenizer": _llama,
    "CodeLlamaTokenizer": _code_llama,
    "Qwen2Tokenizer": _qwen2,
    "GPT2Tokenizer": _gpt2,
}
# Other classes of transformers that do not use a tokenizer.json as it is. Their folders are refused.
_OTHERS = """
    Albert Bart Barthez Bartpho Bert BertGeneration BertJapanese Bertweet BigBird BioGpt Blenderbot BlenderbotSmall
    ByT5 CLIP CTRL Camembert Canine Clvp CodeGen Cohere ConvBert Cpm CpmAnt DPRContextEncoder DPRQuestionEncoder
    DPRReader Deberta DebertaV2 Dia DistilBert Esm Esmc FNet FSMT FastSpeech2Conformer Flaubert Funnel GPTNeoX
    GPTNeoXJapanese GPTSw3 Gemma Herbert Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke M2M100 MBart MBart50 MLuke MPNet
    Marian MarkupLM Mgpstr MobileBert MyT5 Nllb Nougat OpenAIGPT PLBart Pegasus Perceiver Phobert Pop2Piano
    ProphetNet Qwen3_5 Reformer RemBert RoCBert RoFormer Roberta SeamlessM4T Siglip Siglip2 Speech2Text SpeechT5
    Splinter SqueezeBert T5 Tapas Tipsv2 Udop VideoPrism Vits Wav2Vec2CTC Wav2Vec2PhonemeCTC Whisper XGLM XLM
    XLMRoberta XLNet
"""
REFUSED = {f"{name}Tokenizer" for name in _OTHERS.split()}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_INFILL = {f"{name}_token": f"{SPACE}<{name[:3].upper()}>" for name in ("prefix", "middle", "suffix")}
# The special tokens of these classes where the files name no others
DEFAULTS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": {**_LLAMA, **_INFILL, "eot_token": f"{SPACE}<EOT>", "fill_token": "<FILL_ME>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}

"""Small tokenizers of the common kinds, trained by the tests."""

import json
from pathlib import Path

LINES = [
    "Janet's ducks lay 16 eggs per day, and she sells the rest for $2 each.",
    "How many eggs does she sell in 12 days? 16 * 12 = 192, so the answer is 192.",
    "\tThe river was wide,   the bridge was old; nobody knew who had built it.",
    "Human: what is the weather like today? Assistant: It is raining, I'm afraid.",
    "def add(a, b):\n    return a + b  # not more than that",
    "Ein Stück Käse für 3,50 € — naïve façade, señor!",
    "user system assistant question answer please thank you hello there friend",
    "The answer is four. The answer is five. The question is what they mean by it.",
] * 4

TEXTS = [
    *LINES[:8],
    "hello",
    "two  spaces,   three",
    "\n\nHuman: hi there\n\nAssistant:",
    "tail ",
    "unseen: 漢字 🙂 Ω",
    "1234567 890",
]

CHATML = (
    "{%- for message in messages %}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "{{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)

# how Qwen splits
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_sentencepiece(folder: Path, kind: str = "bpe", **changes: object) -> Path:
    """Write folder/tokenizer.model as in Llama 2: byte fallback, single digits, no normalization.

    kind: bpe or unigram. changes: further arguments of the training.
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **changes,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def write_byte_level(
    folder: Path, *, eos: str = "<|im_end|>", bos: str | None = None, template: str | None = CHATML
) -> Path:
    """Write a folder with a byte-level BPE tokenizer.json as in Qwen (bos None) or Llama 3."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + ([bos] if bos else []))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": template,
    }
    settings["pad_token"] = {"content": "<|endoftext|>", "__type": "AddedToken", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder

"""The forms of lines, by mode: the text of each, and which tokens of it are learned."""

import gzip
import json
import re

import numpy as np
import pytest
from rows import AGAIN, ASSISTANT, GPT, HUMAN, OTHER, SYSTEM, USER, first_learned, learned, whole, write
from vocabularies import CHATML, write_byte_level

from rlhf.algorithms import ALGORITHMS
from rlhf.config import Data
from rlhf.contracts import Text
from rlhf.data.forms import FORMS
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError


@pytest.fixture(scope="session")
def tokenizer(llama3):
    return llama3


def test_every_mode_has_a_form():
    assert {algorithm.form for algorithm in ALGORITHMS.values()} == set(FORMS)


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Q?", "response": "A."},
        {"prompt": "Q?", "response": "A.", "source": 3},
        {"prompt": "Q?", "completion": "A."},
        {"question": "Q?", "answer": "A."},
        {"prompt": [USER], "response": "A."},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT], "prompt": "not looked at", "response": "nor this"},
        {"messages": None, "prompt": "Q?", "response": "A."},  # in a table, every line has all keys
        {"conversations": [HUMAN, GPT]},
        {"conversations": [{"from": "user", "value": "Q?"}, {"from": "chatgpt", "value": "A."}], "system": ""},
        {"conversations": [USER, ASSISTANT]},
        {"conversation": [USER, ASSISTANT]},
        {"instruction": "Q?", "output": "A."},
        {"instruction": "Q?", "input": "", "output": "A.", "history": [], "system": None},
        {"instruction": "", "input": "Q?", "output": "A."},
        {"instruction": "Q?", "input": " \n", "context": " ", "output": "A.", "system": " "},
        {"instruction": "Q?", "context": "", "response": "A."},
        {"question": "Q?", "response": "A."},
        {"problem": "Q?", "solution": "A."},
    ],
)
def test_sft_forms(tmp_path, tokenizer, row):
    """By default, texts are written as they are. The tokenizer's own chat template writes messages and instructions."""
    [sample] = Records.load(write(tmp_path / "a.jsonl", row), "demonstrations", tokenizer, Data()).head(0)
    if "instruction" in row or any(isinstance(value, list) for value in row.values()):
        prompt, said = "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n", "A.<|im_end|>\n<|endoftext|>"
        assert whole(tokenizer, sample) == prompt + said
        assert sample.text == Text(row=0, prompt=prompt, record=row, template="tokenizer")
    else:
        said = "A.<|endoftext|>"
        assert whole(tokenizer, sample) == "<|begin|>Q?" + said
        assert sample.text == Text(row=0, prompt="Q?", record=row, template="plain")
    assert learned(tokenizer, sample) == said
    assert (sample.tokens.dtype, sample.mask.dtype, len(sample.mask)) == (np.int32, bool, len(sample.tokens) - 1)
    assert (sample.truncated, sample.reward) == (False, 0.0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?"},
        {"query": "Q?"},
        {"question": "Q?", "answer": "#### 4"},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"messages": [USER, ASSISTANT]},  # the assistant's message is dropped
        {"eval_func": "math_rule", "prompt": "Q?", "answer": "4"},
        {"prompt": "Q?", "chosen": "A.", "rejected": "No."},
        {"conversations": [HUMAN, GPT]},
        {"conversations": [HUMAN]},
        {"conversation": [USER]},
        {"prompt": [HUMAN], "label": True},
        {"instruction": "Q?", "input": None, "output": "A."},
        {"problem": "Q?", "solution": "A.", "messages": [OTHER]},
    ],
)
def test_prompt_forms(tmp_path, tokenizer, row):
    file = write(tmp_path / "a.jsonl", row)
    [sample] = Records.load(file, "prompts", tokenizer, Data(template="human")).head(0)
    assert whole(tokenizer, sample) == "<|begin|>\n\nHuman: Q?\n\nAssistant:"
    assert not sample.mask.any()
    assert sample.mask.shape == (len(sample.tokens) - 1,)
    assert sample.text == Text(row=0, prompt="\n\nHuman: Q?\n\nAssistant:", record=row, template="human")


def test_a_file_may_have_texts_and_messages(tmp_path, qwen):
    """Each record keeps the template that it is written with, also in the folder of tokens and for its limits."""
    rows = [{"prompt": "Q?"}, {"prompt": [USER]}, {"prompt": [SYSTEM, USER], "tools": None}]
    file = write(tmp_path / "a.jsonl", *rows)
    records = Records.load(file, "prompts", qwen, Data(), cache=tmp_path / "cache")
    assert records.templates == {"plain", "tokenizer"}
    cue = "<|im_start|>assistant\n"
    asked = ["Q?", f"<|im_start|>user\nQ?<|im_end|>\n{cue}"]
    samples = records.head(0)
    assert [sample.text.template for sample in samples] == ["plain", "tokenizer", "tokenizer"]
    assert [whole(qwen, sample) for sample in samples[:2]] == asked
    least = len(qwen.encode(cue, control=True))
    cut = Records.load(file, "prompts", qwen, Data(overlong="truncate", max_tokens=least + 1)).head(0)
    assert [whole(qwen, sample) for sample in cut] == ["Q?", f"\n{cue}", f"\n{cue}"]


def test_the_first_record_is_shown_as_the_model_sees_it(tmp_path, qwen):
    def shown(form, *rows, **keys):
        return Records.load(write(tmp_path / "a.jsonl", *rows), form, qwen, Data(**keys)).first().split("\n")

    asked = ["  | <|im_start|>user", "  | Q?<|im_end|>", "  | <|im_start|>assistant"]
    marks = ">>> and <<< enclose what is learned"
    title = f"first record, template tokenizer ({marks}):"
    row = {"messages": [USER, ASSISTANT, AGAIN, OTHER]}
    more = ["  | <|im_start|>user", "  | Sure?<|im_end|>", "  | <|im_start|>assistant", "  | >>>No.<|im_end|><<<"]
    assert shown("demonstrations", row, {"prompt": "Q?", "response": "A."}) == [
        title,
        *asked,
        "  | >>>A.<|im_end|><<<",
        *more,
    ]
    assert shown("demonstrations", row, learn="last") == [title, *asked, "  | A.<|im_end|>", *more]
    assert shown("prompts", {"prompt": [USER]}) == ["first record, template tokenizer (a prompt):", *asked, "  | "]
    pair = {"prompt": "Q?", "chosen": "A." + "x" * 9999, "rejected": "No."}
    said = shown("pairs", pair, max_tokens=10**5)
    assert said == [f"first record, template plain without the tokenizer's chat template ({marks}):", said[1]]
    assert re.fullmatch(r"  \| Q\?>>>A\.x{298} \[\.\.\.\] x{290}<\|im_end\|><<<", said[1])
    turns = [{**turn, "content": "y " * 400} for turn in (USER, ASSISTANT)] * 50
    assert len("".join(shown("demonstrations", {"messages": turns}, max_tokens=10**6))) < 4000


def test_tools_of_a_line_are_written_and_not_learned(tmp_path, qwen):
    template = "{% for t in tools or [] %}<t>{{ t.name }}{% endfor %}" + CHATML.replace(
        "message['content']", "(message.content or 'call ' + message.tool_calls[0].name)"
    )
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, template=template))
    talk = [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
    talk += [{"role": "tool", "content": "4"}, ASSISTANT]
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        row = {"messages": talk, "tools": tools}
        [sample] = Records.load(write(tmp_path / "a.jsonl", row), "demonstrations", tokenizer, Data()).head(0)
        assert whole(tokenizer, sample).startswith("<t>add<|im_start|>user\nQ?")
        assert learned(tokenizer, sample) == "call add<|im_end|>A.<|im_end|>"
    text = write(tmp_path / "b.jsonl", {"prompt": "Q?", "response": "A.", "tools": [{"name": "add"}]})
    [sample] = Records.load(text, "demonstrations", tokenizer, Data(template="tokenizer")).head(0)
    assert whole(tokenizer, sample).startswith("<t>add<|im_start|>user\nQ?")
    text = write(tmp_path / "b.jsonl", {"prompt": "Q?", "response": "A.", "tools": "for the reward"})
    assert whole(tokenizer, Records.load(text, "demonstrations", tokenizer, Data()).head(1)[0]) == "Q?A.<|im_end|>"


@pytest.mark.parametrize("template", ["human", "llama2", "chatml", "tokenizer", "auto"])
def test_a_prompt_of_several_turns_is_a_prompt(tmp_path, qwen, template):
    """The assistant's turns in it are not learned, and it counts as a prompt for the limit of length."""
    file = write(
        tmp_path / "a.jsonl",
        {"messages": [SYSTEM, USER, ASSISTANT, AGAIN, OTHER]},
        {"prompt": [SYSTEM, USER, ASSISTANT, AGAIN]},
    )
    first, second = Records.load(file, "prompts", qwen, Data(template=template)).head(0)
    assert not first.mask.any()
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.text.prompt == second.text.prompt == whole(qwen, first)
    with pytest.raises(UserError, match=re.escape(f"{file}:1: prompt of {len(first.tokens)} tokens is longer than 5")):
        Records.load(file, "prompts", qwen, Data(template=template), max_prompt=5)


@pytest.mark.parametrize("form", ["scored", "pairs"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?", "chosen": "A.", "rejected": "No."},
        {"query": "Q?", "chosen": "A.", "rejected": "No."},
        {"prompt": [USER], "chosen": "A.", "rejected": "No."},
        {"prompt": "Q?", "chosen": [ASSISTANT], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},  # the prompt is repeated
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},  # the prompt is part of the messages
        {"prompt": "Q?", "prompt_id": "x", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER], "score_chosen": 8.5},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "No."}},
        {"prompt": "Q?", "chosen": ASSISTANT, "rejected": OTHER, "label": True},
        {"chosen": [HUMAN, GPT], "rejected": [HUMAN, {"from": "gpt", "value": "No."}]},
        {"instruction": "Q?", "input": "", "chosen": "A.", "rejected": "No."},
        {"system": "", "question": "Q?", "chosen": "A.", "rejected": "No."},
    ],
)
def test_pairs(tmp_path, tokenizer, form, row):
    """A pair is one group with rewards 1 and 0 and one prompt. Only its last responses are learned."""
    file = write(tmp_path / "a.jsonl", row, row)
    samples = Records.load(file, form, tokenizer, Data(template="human", learn="all")).head(0)
    assert [(s.group, s.reward) for s in samples] == [(0, 1.0), (0, 0.0), (1, 1.0), (1, 0.0)]
    for sample, said in zip(samples, ("A.", "No.", "A.", "No."), strict=True):
        assert whole(tokenizer, sample) == f"<|begin|>\n\nHuman: Q?\n\nAssistant: {said}<|endoftext|>"
        assert learned(tokenizer, sample) == f" {said}<|endoftext|>"
        assert sample.text.record == row


@pytest.mark.parametrize("learn", ["all", "last"])
def test_pairs_of_several_turns_learn_the_last(tmp_path, tokenizer, learn):
    turns = [SYSTEM, USER, ASSISTANT, AGAIN]
    rows = [
        {"prompt": turns, "chosen": [ASSISTANT], "rejected": [OTHER]},
        {"prompt": turns[:2], "chosen": [*turns[2:], ASSISTANT], "rejected": [*turns[2:], OTHER]},
        {"chosen": [*turns, ASSISTANT], "rejected": [*turns, OTHER]},
        # the whole conversation, of which the prompt is a part
        {"prompt": AGAIN["content"], "chosen": [*turns, ASSISTANT], "rejected": [*turns, OTHER]},
        {"prompt": [USER], "chosen": [*turns, ASSISTANT], "rejected": [*turns, OTHER]},
        {"prompt": [{**AGAIN, "id": 3}], "chosen": [*turns, ASSISTANT], "rejected": [*turns, OTHER]},
    ]
    samples = Records.load(
        write(tmp_path / "a.jsonl", *rows), "pairs", tokenizer, Data(template="llama2", learn=learn)
    ).head(0)
    assert len({whole(tokenizer, sample) for sample in samples}) == 2
    assert [learned(tokenizer, sample) for sample in samples] == [" A. <|endoftext|>", " No. <|endoftext|>"] * 6


@pytest.mark.parametrize("query", ["query", "prompt"])
def test_scored_responses(tmp_path, tokenizer, query):
    """The tutorial's form of reward data has k responses with scores, and allows ties."""
    rows = [
        {query: "Q?", "response": ["A.", "No.", "four"], "score": [1, -0.5, 1.0]},
        {query: [USER], "response": ["A.", "No."], "score": [0, 2]},
    ]
    samples = Records.load(write(tmp_path / "a.jsonl", *rows), "scored", tokenizer, Data(template="llama2")).head(0)
    assert [(s.group, s.reward) for s in samples] == [(0, 1.0), (0, -0.5), (0, 1.0), (1, 0.0), (1, 2.0)]
    assert [learned(tokenizer, s) for s in samples] == [
        f" {said} <|endoftext|>" for said in ("A.", "No.", "four", "A.", "No.")
    ]
    assert {s.text.prompt for s in samples} == {"[INST] Q? [/INST]"}


@pytest.mark.parametrize(("learn", "said"), [("all", " Un. Deux.<|endoftext|>"), ("last", " Deux.<|endoftext|>")])
def test_learned_turns_of_a_conversation(tmp_path, tokenizer, learn, said):
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "Un."), ("user", "Two?"), ("assistant", "Deux.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = write(tmp_path / "a.jsonl", {"messages": messages})
    [sample] = Records.load(file, "demonstrations", tokenizer, Data(template="human", learn=learn)).head(0)
    assert learned(tokenizer, sample) == said
    assert (
        whole(tokenizer, sample)
        == "<|begin|>Be brief.\n\nHuman: One?\n\nAssistant: Un.\n\nHuman: Two?\n\nAssistant: Deux.<|endoftext|>"
    )


@pytest.mark.parametrize("form", ["demonstrations", "pairs"])
def test_nothing_stands_behind_the_end_of_a_response(tmp_path, qwen, form):
    """A template may add text after it. It is dropped, so that samples end like an engine's, at the stop token."""
    row = {"prompt": "Q?", "response": "A.", "chosen": "A.", "rejected": "No."}
    for sample in Records.load(write(tmp_path / "a.jsonl", row), form, qwen, Data(template="chatml")).head(0):
        assert sample.tokens[-1] == qwen.eos
        assert sample.mask[-1]


def test_human_messages_are_the_tokens_of_the_texts_in_hh(tmp_path, llama2, llama3, qwen, shared_data):
    """Dialogues as text with template plain, and as messages with template human, give the same samples."""
    with gzip.open(shared_data / "hh_harmless_test.jsonl.gz") as lines:
        texts = [
            json.loads(line)["chosen"].rpartition("\n\nAssistant:")[::2]
            for _, line in zip(range(100), lines, strict=False)
        ]
    plain, human = [], []
    for prompt, response in texts:
        parts = re.split(r"\n\n(Human|Assistant): ", prompt)[1:]
        if (
            parts[::2] != (["Human", "Assistant"] * len(parts))[: len(parts) // 2]
            or len(parts) % 4 != 2
            or not response.strip()
        ):
            continue  # two turns of one speaker in a row, or none
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(parts[1::2])]
        plain.append(
            {"prompt": prompt + "\n\nAssistant:", "chosen": response, "rejected": " Yes.", "response": response}
        )
        human.append({"prompt": turns, "chosen": response[1:], "rejected": "Yes.", "response": response[1:]})
    assert len(plain) > 80
    assert max(len(row["prompt"]) for row in human) > 5
    for tokenizer in (llama2, llama3, qwen):
        for form, learn in (("pairs", "all"), ("demonstrations", "last"), ("prompts", "all")):
            a = Records.load(write(tmp_path / "plain.jsonl", *plain), form, tokenizer, Data(max_tokens=10**5)).head(0)
            data = Data(max_tokens=10**5, template="human", learn=learn)
            b = Records.load(write(tmp_path / "human.jsonl", *human), form, tokenizer, data).head(0)
            for x, y in zip(a, b, strict=True):
                assert x.tokens.tolist() == y.tokens.tolist()
                assert x.mask.tolist() == y.mask.tolist()
                assert (x.reward, x.text.prompt) == (y.reward, y.text.prompt)


def test_siblings_are_cut_alike(tmp_path, tokenizer):
    """Both responses of a pair over the limit keep the same prompt.

    The longer response decides how much of the prompt is cut. A pair is dropped as a whole.
    """
    row = {
        "prompt": "the question is what they mean by it " * 6,
        "chosen": "five",
        "rejected": "the answer is four " * 3,
    }
    file = write(tmp_path / "a.jsonl", row, {"prompt": "Q?", "chosen": "A.", "rejected": "No."})
    data = {"template": "human", "max_tokens": 60}
    records = Records.load(file, "pairs", tokenizer, Data(overlong="truncate", **data))
    chosen, rejected, *_ = records.head(0)
    assert (records.counts.kept, records.counts.truncated, records.counts.dropped) == (2, 1, 0)
    assert len(rejected.tokens) == 60
    start = first_learned(chosen)
    assert chosen.tokens[:start].tolist() == rejected.tokens[:start].tolist()
    assert first_learned(rejected) == start
    assert learned(tokenizer, chosen) == " five<|endoftext|>"
    assert learned(tokenizer, rejected) == " " + row["rejected"] + "<|endoftext|>"
    assert tokenizer.decode(chosen.tokens[:start]).endswith("\n\nAssistant:")

    dropped = Records.load(file, "pairs", tokenizer, Data(overlong="drop", **data))
    assert [(s.text.row, s.reward) for s in dropped.head(0)] == [(1, 1.0), (1, 0.0)]
    assert (dropped.counts.kept, dropped.counts.dropped) == (1, 1)
    with pytest.raises(UserError, match=re.escape(f"{file}:1: conversation of ")):
        Records.load(file, "pairs", tokenizer, Data(**data))

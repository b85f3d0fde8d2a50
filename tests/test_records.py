"""Records: forms of lines, limits, errors that name file:line, and the laws of drawing."""

import gzip
import json
import re
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from vocabularies import write_byte_level, write_sentencepiece

from rlhf.config import MODES, Data
from rlhf.contracts import UserError
from rlhf.data import templates
from rlhf.data.records import FORMS, Records, permutation
from rlhf.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("llama3"), bos="<|begin|>", eos="<|endoftext|>"))


@pytest.fixture(scope="session")
def llama2(tmp_path_factory):
    return Tokenizer.load(write_sentencepiece(tmp_path_factory.mktemp("llama2")))


def write(file, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def first_lines(file, count):
    with gzip.open(file) as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


def learned(tokenizer, sample):
    """The text that the policy learns to say: labels[t] = tokens[t + 1] where mask[t]."""
    return tokenizer.decode(sample.tokens[1:][sample.mask], skip_special=False)


def read(tokenizer, sample):
    return tokenizer.decode(sample.tokens, skip_special=False)


@pytest.mark.parametrize(
    ("row", "text", "response"),
    [
        ({"query": "Q?", "response": "A."}, "Q?A.", "A."),
        ({"prompt": "Q?", "response": "A.", "source": 3}, "Q?A.", "A."),
        ({"question": "Q?", "answer": "A."}, "Q?A.", "A."),
        ({"prompt": [{"role": "user", "content": "Q?"}], "response": "A."}, "Q?A.", "A."),
        ({"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]}, "Q?A.", "A."),
    ],
)
def test_sft_forms(tmp_path, tokenizer, row, text, response):
    [sample] = Records.load(write(tmp_path / "a.jsonl", row), "sft", tokenizer, Data()).head(0)
    assert read(tokenizer, sample) == f"<|begin|>{text}<|endoftext|>"
    assert learned(tokenizer, sample) == f"{response}<|endoftext|>"
    assert sample.meta == {"row": 0, "prompt": "Q?", "record": row}
    assert (sample.tokens.dtype, sample.mask.dtype, len(sample.mask)) == (np.int32, bool, len(sample.tokens) - 1)
    assert not sample.truncated


@pytest.mark.parametrize("mode", ["grpo", "evaluate"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?"},
        {"query": "Q?"},
        {"question": "Q?", "answer": "#### 4"},
        {"prompt": [{"role": "user", "content": "Q?"}]},
        {"eval_func": "math_rule", "prompt": "Q?", "answer": "4"},
    ],
)
def test_prompt_forms(tmp_path, tokenizer, mode, row):
    file = write(tmp_path / "a.jsonl", row)
    [sample] = Records.load(file, mode, tokenizer, Data(template="human")).head(0)
    assert read(tokenizer, sample) == "<|begin|>\n\nHuman: Q?\n\nAssistant:"
    assert not sample.mask.any()
    assert sample.mask.shape == (len(sample.tokens) - 1,)
    assert sample.meta == {"row": 0, "prompt": "\n\nHuman: Q?\n\nAssistant:", "record": row}


def test_a_form_is_one_entry(tmp_path, tokenizer, monkeypatch, shared_data):
    """Pairs of real HH-RLHF dialogues as siblings: one group, rewards 1 and 0, a shared prompt."""

    def pair(row, keys):
        prompt = row["chosen"].rpartition("\n\nAssistant:")[0]
        answers = [row[key].rpartition("\n\nAssistant:")[2] or " " for key in keys]
        user = {"role": "user", "content": prompt + "\n\nAssistant:"}
        return [[user, {"role": "assistant", "content": answer}] for answer in answers]

    monkeypatch.setitem(FORMS, "dpo", {("chosen", "rejected"): pair})
    file = write(tmp_path / "pairs.jsonl", *first_lines(shared_data / "hh_harmless_test.jsonl.gz", 100))
    records = Records.load(file, "dpo", tokenizer, Data(max_tokens=10**5))
    assert len(records) == 100
    samples = records.draw(0, 8, seed=1)
    assert [sample.group for sample in samples] == [group for group in range(8) for _ in range(2)]
    assert [sample.reward for sample in samples] == [1.0, 0.0] * 8
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        row = chosen.meta["record"]
        assert chosen.meta == rejected.meta
        assert chosen.meta["prompt"] + learned(tokenizer, chosen) == row["chosen"] + "<|endoftext|>"
        assert learned(tokenizer, rejected) == row["rejected"].rpartition("\n\nAssistant:")[2] + "<|endoftext|>"


def test_loss_on_every_assistant_turn(tmp_path, tokenizer):
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "Un."), ("user", "Two?"), ("assistant", "Deux.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = write(tmp_path / "a.jsonl", {"messages": messages})
    [sample] = Records.load(file, "sft", tokenizer, Data(template="human")).head(0)
    assert learned(tokenizer, sample) == " Un.<|endoftext|> Deux.<|endoftext|>"
    assert sample.meta["prompt"] == "Be brief.\n\nHuman: One?\n\nAssistant:"


def test_files_and_folders(tmp_path, tokenizer):
    """Files of a folder in the order of their names, blank lines skipped, other files left alone."""
    write(tmp_path / "b.jsonl.gz", {"prompt": "three"}, "", {"prompt": "four"})
    write(tmp_path / "a.jsonl", {"prompt": "one"}, "  ", {"prompt": "two"})
    write(tmp_path / "c.json", {"prompt": "fünf 🙂"})
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.jsonl").write_text("folders in it are not read")
    samples = Records.load(tmp_path, "grpo", tokenizer, Data()).head(0)
    assert [sample.meta["prompt"] for sample in samples] == ["one", "two", "three", "four", "fünf 🙂"]
    assert [sample.meta["row"] for sample in samples] == [0, 1, 2, 3, 4]
    assert [sample.group for sample in samples] == [0, 1, 2, 3, 4]
    assert len(Records.load(tmp_path / "b.jsonl.gz", "grpo", tokenizer, Data())) == 2


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{'prompt'", "not JSON (Expecting property name"),
        ("[", "not JSON (Expecting value"),
        ('["prompt"]', "not an object but ['prompt']; write one object per line"),
        ({"text": "hi", "id": 1}, "has the keys 'text', 'id'; give it 'prompt', or 'query', or 'question'"),
        ({}, "has the keys none; give it 'prompt'"),
        ({"prompt": 3}, "'prompt' is 3; give a string"),
        ({"prompt": None}, "'prompt' is None; give a string"),
        ({"prompt": " \n"}, "'prompt' is empty; give it a text or remove the line"),
        (r'{"prompt": "half \ud83d"}', "the text has half of a surrogate pair in it ("),
        ({"prompt": []}, "messages are []; give a list of objects with 'role' and 'content'"),
        ({"prompt": [{"role": "user"}]}, "message 1 is {'role': 'user'}; give an object with the strings 'role' and 'content'"),
        ({"prompt": [{"role": "human", "content": "x"}]}, "message 1 has role 'human', expected 'user'"),
        (
            {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "'prompt' ends with the assistant, who is to answer it; end it with the user",
        ),
        ({"prompt": "one two three four five six seven eight"}, "tokens is longer than 20; shorten it, raise data.max_tokens, or set"),
    ],
)
def test_prompt_errors_name_the_line(tmp_path, tokenizer, line, error):
    file = write(tmp_path / "a.jsonl", {"prompt": "good"}, "", line)
    with pytest.raises(UserError, match=re.escape(error)) as caught:
        Records.load(tmp_path, "grpo", tokenizer, Data(max_tokens=20))
    assert str(caught.value).startswith(f"{file}:3: ")
    assert "\n" not in str(caught.value)


USER, ASSISTANT = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ({"prompt": "Q?"}, "has the keys 'prompt'; give it 'messages', or 'prompt' and 'response', or 'query' and 'response', or"),
        ({"prompt": "Q?", "response": ""}, "'response' is empty"),
        ({"prompt": "Q?", "response": ["A."]}, "'response' is ['A.']; give a string"),
        ({"messages": [USER]}, "'messages' ends with 'user'; end it with the assistant, whose turns are learned"),
        ({"messages": [USER, USER, ASSISTANT]}, "message 2 has role 'user', expected 'assistant'"),
        ({"prompt": "Q?", "response": "A. " * 30}, "tokens is longer than 32; shorten it, raise data.max_tokens"),
    ],
)
def test_sft_errors_name_the_line(tmp_path, tokenizer, line, error):
    file = write(tmp_path / "a.jsonl.gz", {"prompt": "Q?", "response": "A."}, line)
    with pytest.raises(UserError, match=re.escape(error)) as caught:
        Records.load(file, "sft", tokenizer, Data(max_tokens=32))
    assert str(caught.value).startswith(f"{file}:2: ")


def test_required_keys(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", {"prompt": "Q?", "answer": 4}, {"prompt": "Q?", "answer": None})
    assert len(Records.load(file, "grpo", tokenizer, Data())) == 2
    with pytest.raises(UserError, match=re.escape(f"{file}:2: no 'answer', which the reward needs; add it")):
        Records.load(file, "grpo", tokenizer, Data(), required=("answer",))


def test_errors_of_files(tmp_path, tokenizer):
    def fails(path, message):
        with pytest.raises(UserError, match=message) as caught:
            Records.load(path, "sft", tokenizer, Data())
        assert str(path) in str(caught.value)

    fails(tmp_path / "nowhere.jsonl", "no such file or folder; set data.train")
    fails(tmp_path, r"no file in this folder ends in .jsonl, ")
    fails(write(tmp_path / "empty.jsonl", "", " "), "has no records: no lines; set data.train")
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    fails(tmp_path / "plain.jsonl.gz", "cannot be read .*copy the file again")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x", "response": "y"}\n' * 9)[:-12])
    fails(tmp_path / "cut.jsonl.gz", "cannot be read .*copy the file again")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    fails(tmp_path / "latin.jsonl", r"latin.jsonl:1: not JSON")


def test_overlong_prompts(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", {"prompt": "short"}, {"prompt": "the answer is four " * 9}, {"prompt": "also short"})
    data = Data(template="human", max_tokens=60)
    whole, _ = templates.encode(tokenizer, "human", [{"role": "user", "content": "the answer is four " * 9}])
    with pytest.raises(UserError, match=re.escape(f"{file}:2: prompt of {len(whole)} tokens is longer than 40; shorten it")):
        Records.load(file, "grpo", tokenizer, data, max_prompt=40)

    dropped = Records.load(file, "grpo", tokenizer, Data(template="human", overlong="drop"), max_prompt=40)
    assert [sample.meta["row"] for sample in dropped.head(0)] == [0, 2]
    assert asdict(dropped.counts) == {"kept": 2, "truncated": 0, "dropped": 1}

    cut = Records.load(file, "grpo", tokenizer, Data(template="human", overlong="truncate"), max_prompt=40)
    tokens = cut.head(0)[1].tokens.tolist()
    assert tokens == [tokenizer.bos, *whole[-39:]]
    assert tokenizer.decode(tokens).endswith("\n\nAssistant:")
    assert asdict(cut.counts) == {"kept": 3, "truncated": 1, "dropped": 0}
    assert [sample.truncated for sample in cut.head(0)] == [False] * 3, "truncated tells of responses"
    assert not any(sample.mask.any() for sample in cut.head(0))

    with pytest.raises(UserError, match=r"a.jsonl has no records: 3 lines, all over data.max_tokens; raise it"):
        Records.load(file, "grpo", tokenizer, Data(overlong="drop"), max_prompt=2)
    least = 1 + templates.num_cue(tokenizer, "human")
    error = f"{file}:1: data.max_tokens leaves {least} tokens here, but bos and cue alone are {least}; raise it"
    with pytest.raises(UserError, match=re.escape(error)):
        Records.load(file, "grpo", tokenizer, Data(template="human", overlong="truncate", max_tokens=least))


@pytest.mark.parametrize("fixture", ["tokenizer", "llama2"])
def test_overlong_conversations(tmp_path, request, fixture):
    """The prompt gives way from the left; only a response that does not fit beside bos and cue is cut, and loses its eos."""
    tokenizer = request.getfixturevalue(fixture)
    prompt, response = "the question is what they mean by it " * 6, "the answer is five"
    file = write(tmp_path / "a.jsonl", {"prompt": prompt, "response": response})
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids, learn = templates.encode(tokenizer, "human", messages)
    start, cue = learn.index(True), templates.num_cue(tokenizer, "human")

    def load(limit):
        records = Records.load(file, "sft", tokenizer, Data(template="human", overlong="truncate", max_tokens=limit))
        assert records.counts.truncated == (limit < len(ids))
        [sample] = records.head(0)
        assert len(sample.tokens) == min(limit, len(ids))
        return sample

    for limit in range(cue + 2, len(ids) + 2):
        sample = load(limit)
        left = max(cue, min(limit, len(ids)) - (len(ids) - start) - 1)  # of the prompt, beside its bos
        kept = min(limit - 1 - left, len(ids) - start)
        assert sample.tokens.tolist() == [tokenizer.bos, *ids[start - left : start + kept]]
        assert sample.tokens[1:][sample.mask].tolist() == ids[start : start + kept]
        assert sample.truncated == (kept < len(ids) - start) == (sample.tokens[-1] != tokenizer.eos)


def test_overlong_dialogues_keep_their_last_response(tmp_path, tokenizer):
    turns = [USER, {"role": "assistant", "content": "the first answer " * 9}, USER, {"role": "assistant", "content": "the last one"}]
    file = write(tmp_path / "a.jsonl", {"messages": turns})
    [sample] = Records.load(file, "sft", tokenizer, Data(template="human", overlong="truncate", max_tokens=60)).head(0)
    assert len(sample.tokens) == 60
    assert learned(tokenizer, sample).endswith("<|endoftext|> the last one<|endoftext|>")
    assert read(tokenizer, sample).startswith("<|begin|>")
    assert not sample.truncated


@pytest.fixture(scope="session")
def ten(tmp_path_factory, tokenizer):
    file = write(tmp_path_factory.mktemp("ten") / "a.jsonl", *({"prompt": f"number {n}"} for n in range(10)))
    return Records.load(file, "grpo", tokenizer, Data())


def rows(samples):
    return [sample.meta["row"] for sample in samples]


@pytest.mark.parametrize("count", [1, 3, 4, 10, 25])
def test_every_record_comes_once_per_epoch(ten, count):
    """Steps cut a chain of permutations, wherever the epochs end."""
    drawn = [row for step in range(20) for row in rows(ten.draw(step, count, seed=7))]
    epochs = [drawn[i : i + 10] for i in range(0, len(drawn) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs), "no two epochs alike"


def test_draws_depend_on_seed_and_step_alone(ten):
    forwards = [rows(ten.draw(step, 4, seed=7)) for step in range(9)]
    backwards = [rows(ten.draw(step, 4, seed=7)) for step in reversed(range(9))]
    assert forwards == backwards[::-1]
    assert forwards != [rows(ten.draw(step, 4, seed=8)) for step in range(9)]
    assert [sample.group for sample in ten.draw(2, 4, seed=7)] == [0, 1, 2, 3]


def test_samples_share_nothing(ten):
    first, again = ten.draw(0, 3, seed=1), ten.draw(0, 3, seed=1)
    first[0].tokens[:] = 0
    first[0].mask[:] = True
    assert again[0].tokens.any()
    assert not ten.draw(0, 3, seed=1)[0].mask.any()


def test_permutations_are_uniform_and_stay_as_they_are():
    assert permutation(6, seed=1, epoch=0).tolist() == [2, 0, 1, 4, 5, 3], "a resumed run counts on this order"
    places = Counter((int(row), place) for seed in range(3000) for place, row in enumerate(permutation(4, seed, 0)))
    assert all(abs(count - 750) < 120 for count in places.values()), places  # 5 sigma
    assert len(places) == 16


def test_head_is_the_first_records_in_order(ten):
    assert rows(ten.head(3)) == [0, 1, 2]
    assert rows(ten.head(0)) == rows(ten.head(99)) == list(range(10))


def test_gsm8k(tmp_path, tokenizer, llama2, shared_data):
    """The real files, as prompts and as conversations to learn."""
    file = shared_data / "gsm8k_test.jsonl.gz"
    prompts = Records.load(file, "grpo", llama2, Data(template="human"), required=("answer",))
    assert len(prompts) == 1319
    assert asdict(prompts.counts) == {"kept": 1319, "truncated": 0, "dropped": 0}
    for sample in prompts.draw(3, 16, seed=1):
        record = sample.meta["record"]
        assert "####" in record["answer"]
        assert llama2.decode(sample.tokens) == f"\n\nHuman: {record['question']}\n\nAssistant:" == sample.meta["prompt"]
    some = write(tmp_path / "some.jsonl", *first_lines(file, 50))
    for sample in Records.load(some, "sft", tokenizer, Data(template="chatml")).head(0):
        record = sample.meta["record"]
        assert learned(tokenizer, sample) == record["answer"] + "<|im_end|><|endoftext|>"
        assert sample.meta["prompt"] == f"<|im_start|>user\n{record['question']}<|im_end|>\n<|im_start|>assistant\n"


def test_modes_of_the_configuration_have_forms():
    assert set(MODES) <= set(FORMS)

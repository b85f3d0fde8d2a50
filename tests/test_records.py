"""Records: limits, processes, and the order of drawing."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from rows import first_lines, learned, whole, write

from rlhf.config import Data
from rlhf.data import reader, templates
from rlhf.data.forms import ANSWER
from rlhf.data.records import Counts, Records, permutation
from rlhf.errors import UserError


@pytest.fixture(scope="session")
def tokenizer(llama3):
    return llama3


def test_overlong_prompts(tmp_path, tokenizer):
    file = write(
        tmp_path / "a.jsonl", {"prompt": "short"}, {"prompt": "the answer is four " * 9}, {"prompt": "also short"}
    )
    data = Data(template="human", max_tokens=60)
    ids, _ = templates.encode(tokenizer, "human", [{"role": "user", "content": "the answer is four " * 9}])
    with pytest.raises(
        UserError, match=re.escape(f"{file}:2: prompt of {len(ids)} tokens is longer than 40; shorten it")
    ):
        Records.load(file, "prompts", tokenizer, data, max_prompt=40)

    dropped = Records.load(file, "prompts", tokenizer, Data(template="human", overlong="drop"), max_prompt=40)
    assert [sample.text.row for sample in dropped.head(0)] == [0, 2]
    assert str(dropped.counts) == "2 records (0 truncated, 1 dropped)"

    cut = Records.load(file, "prompts", tokenizer, Data(template="human", overlong="truncate"), max_prompt=40)
    tokens = cut.head(0)[1].tokens.tolist()
    assert tokens == [tokenizer.bos, *ids[-39:]]
    assert tokenizer.decode(tokens).endswith("\n\nAssistant:")
    assert str(cut.counts) == "3 records (1 truncated, 0 dropped)"
    assert [sample.truncated for sample in cut.head(0)] == [False] * 3, "truncated tells of responses"
    assert not any(sample.mask.any() for sample in cut.head(0))

    with pytest.raises(
        UserError, match=r"a.jsonl has no records: all 3 lines are longer than data.max_tokens; raise it"
    ):
        Records.load(file, "prompts", tokenizer, Data(overlong="drop"), max_prompt=2)
    least = 1 + templates.num_cue(tokenizer, "human")
    error = f"{file}:1: data.max_tokens leaves {least} tokens here, but bos and cue alone have {least}; raise it"
    with pytest.raises(UserError, match=re.escape(error)):
        Records.load(file, "prompts", tokenizer, Data(template="human", overlong="truncate", max_tokens=least))


@pytest.mark.parametrize("fixture", ["llama3", "llama2"])
def test_overlong_conversations(tmp_path, request, fixture):
    """The prompt is cut from the left.

    A response is cut only if it does not fit beside bos and cue, and then has no eos.
    """
    tokenizer = request.getfixturevalue(fixture)
    prompt, response = "the question is what they mean by it " * 6, "the answer is five"
    file = write(tmp_path / "a.jsonl", {"prompt": prompt, "response": response})
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids, learn = templates.encode(tokenizer, "human", messages)
    start, cue = learn.index(True), templates.num_cue(tokenizer, "human")

    def load(limit):
        records = Records.load(
            file, "demonstrations", tokenizer, Data(template="human", overlong="truncate", max_tokens=limit)
        )
        assert records.counts.truncated == (limit < len(ids))
        [sample] = records.head(0)
        assert len(sample.tokens) == min(limit, len(ids))
        return sample

    for limit in range(cue + 2, len(ids) + 2):
        sample = load(limit)
        left = max(cue, min(limit, len(ids)) - (len(ids) - start) - 1)  # tokens of the prompt, beside its bos
        kept = min(limit - 1 - left, len(ids) - start)
        assert sample.tokens.tolist() == [tokenizer.bos, *ids[start - left : start + kept]]
        assert sample.tokens[1:][sample.mask].tolist() == ids[start : start + kept]
        assert sample.truncated == (kept < len(ids) - start) == (sample.tokens[-1] != tokenizer.eos)


@pytest.mark.parametrize("fixture", ["llama3", "llama2"])
def test_plain_texts_keep_the_cue_that_they_spell(tmp_path, request, fixture):
    """The tutorial's dialogues are texts with markers.

    If the response is as long as the limit, only the cue remains of the prompt.
    """
    tokenizer = request.getfixturevalue(fixture)
    asked, response = "\n\nHuman: what do they mean by it?\n\nAssistant:", " the answer is five" * 9
    file = write(
        tmp_path / "a.jsonl", {"prompt": asked, "response": response}, {"prompt": "no marker", "response": response}
    )
    ids = templates.encode(tokenizer, "plain", [{"role": "user", "content": asked}])[0]
    for limit in range(24, 40):
        spelt, free = Records.load(file, "demonstrations", tokenizer, Data(overlong="truncate", max_tokens=limit)).head(
            0
        )
        kept = len(spelt.tokens) - int(spelt.mask.sum())
        assert tokenizer.decode(spelt.tokens[:kept].tolist()).strip() == "Assistant:"
        assert spelt.tokens[1:kept].tolist() == ids[1 - kept :]
        assert (len(spelt.tokens), spelt.truncated) == (limit, True)
        assert len(free.tokens) - int(free.mask.sum()) == 1  # its bos


def test_overlong_dialogues_keep_their_last_response(tmp_path, tokenizer):
    user = {"role": "user", "content": "Q?"}
    turns = [
        user,
        {"role": "assistant", "content": "the first answer " * 9},
        user,
        {"role": "assistant", "content": "the last one"},
    ]
    file = write(tmp_path / "a.jsonl", {"messages": turns})
    [sample] = Records.load(
        file, "demonstrations", tokenizer, Data(template="human", overlong="truncate", max_tokens=60)
    ).head(0)
    assert len(sample.tokens) == 60
    assert learned(tokenizer, sample).endswith("the first answer  the last one<|endoftext|>")
    assert whole(tokenizer, sample).startswith("<|begin|>")
    assert not sample.truncated


def test_tokens_are_made_once(tmp_path, tokenizer, monkeypatch):
    """The second load reads the tokens that the first one wrote: the samples are equal, and nothing is tokenized."""
    rows = [{"query": f"Q {n}?", "response": ["four", "five" * n, "é"], "score": [n, 0.5, -1]} for n in range(1, 9)]
    file = write(
        tmp_path / "a.jsonl", *rows, {"query": "Q?", "response": ["the answer is four " * 9, "no"], "score": [1, 0]}
    )

    def load():
        return Records.load(file, "scored", tokenizer, Data(overlong="drop", max_tokens=40), cache=tmp_path / "cache")

    first = load()
    assert first.counts == Counts(kept=8, dropped=1)
    monkeypatch.setattr(templates, "encode", lambda *_: pytest.fail("tokenized again"))
    again = load()
    assert again.counts == first.counts
    for a, b in zip(first.draw(1, 5, seed=3), again.draw(1, 5, seed=3), strict=True):
        assert (a.tokens.tolist(), a.mask.tolist()) == (b.tokens.tolist(), b.mask.tolist())
        assert (a.group, a.reward, a.truncated, a.text) == (b.group, b.reward, b.truncated, b.text)


@pytest.fixture
def processes(monkeypatch):
    """Tokenize even small files with several processes, a few lines at a time."""

    def set_processes(count):
        monkeypatch.setattr(reader, "CHUNK", 200)
        monkeypatch.setattr(reader.os, "sched_getaffinity", lambda _: range(count))

    return set_processes


@pytest.mark.parametrize("fixture", ["llama3", "llama2"])
def test_many_processes_make_what_one_makes(tmp_path, request, fixture, processes, monkeypatch):
    """The files of tokens are bitwise equal, also if all lines of a chunk are dropped."""
    rows = [{"query": f"Q {n}?", "response": ["four " * (n % 7 + 1), "é"], "score": [n, -1]} for n in range(40)]
    rows[10:20] = [{"query": "Q?", "response": ["the answer is four " * 30, "no"], "score": [1, 0]}] * 10
    file = write(tmp_path / "a.jsonl.gz", *rows[:25], "", *rows[25:])
    started = []
    deal = reader._deal
    monkeypatch.setattr(
        reader, "_deal", lambda chunks, connections: started.append(len(connections)) or deal(chunks, connections)
    )

    def load(name):
        data, cache = Data(overlong="drop", max_tokens=60), tmp_path / name
        records = Records.load(file, "scored", request.getfixturevalue(fixture), data, cache=cache)
        assert records.counts == Counts(kept=30, dropped=10)
        [kept] = cache.iterdir()
        return kept.name, {path.name: path.read_bytes() for path in kept.iterdir()}

    alone = load("alone")
    processes(3)
    assert load("apart") == alone
    assert started == [3]


def test_many_processes_tell_the_first_mistake(tmp_path, tokenizer, processes):
    processes(2)
    rows = [{"prompt": f"question {n}"} for n in range(60)]
    rows[31], rows[32], rows[58] = {"prompt": ""}, {"text": "?"}, "{"
    file = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError, match=re.escape(f"{file}:32: 'prompt' is empty; give it a text or remove the line")):
        Records.load(file, "prompts", tokenizer, Data())
    counts = Records.load(file, "prompts", tokenizer, Data(invalid="skip")).counts
    assert (counts.kept, counts.skipped, counts.reason) == (
        57,
        3,
        f"{file}:32: 'prompt' is empty; give it a text or remove the line",
    )


def die(reader, connection):
    """End as if memory ran out: before anything is read, in the middle, or in the middle of an answer."""
    if reader.data.learn == "last":
        connection.recv()
        os.write(connection.fileno(), b"\0\0")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("learn", ["all", "last"])
def test_a_killed_process_is_told(tmp_path, tokenizer, processes, monkeypatch, learn):
    processes(2)
    monkeypatch.setattr(reader, "_serve", die)
    file = write(tmp_path / "a.jsonl", *({"prompt": f"question {n}"} for n in range(60)))
    with pytest.raises(
        UserError, match=re.escape(f"data set {file}: a process that tokenizes it was killed; if memory ran out")
    ):
        Records.load(file, "prompts", tokenizer, Data(learn=learn))


def test_processes_end_with_the_one_that_started_them():
    """They must end, because they have inherited its standard output, and a reader waits until all of them close it."""
    code = (
        "import os; from rlhf.data.reader import *; from rlhf.data.reader import _serve\n"
        "ours, theirs = get_context('spawn').Pipe()\n"
        "get_context('spawn').Process(target=_serve, "
        "args=(Reader('prompts', None, Data(), None, ()), theirs)).start()\n"
        "ours.send([])\n"
        "print(len(ours.recv()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=Path(__file__).parents[1], timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.strip().isdigit(), "one of them had started"


@pytest.fixture(scope="session")
def ten(tmp_path_factory, tokenizer):
    file = write(tmp_path_factory.mktemp("ten") / "a.jsonl", *({"prompt": f"number {n}"} for n in range(10)))
    return Records.load(file, "prompts", tokenizer, Data())


def rows(samples):
    return [sample.text.row for sample in samples]


@pytest.mark.parametrize("count", [1, 3, 4, 10, 25])
def test_every_record_comes_once_per_epoch(ten, count):
    """Steps are parts of a chain of permutations, and an epoch may end within a step."""
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
    prompts = Records.load(file, "prompts", llama2, Data(template="human"), required=(ANSWER,))
    assert len(prompts) == 1319
    assert prompts.counts == Counts(kept=1319)
    for sample in prompts.draw(3, 16, seed=1):
        record = sample.text.record
        assert "####" in record["answer"]
        assert llama2.decode(sample.tokens) == f"\n\nHuman: {record['question']}\n\nAssistant:" == sample.text.prompt
    some = write(tmp_path / "some.jsonl", *first_lines(file, 50))
    for sample in Records.load(some, "demonstrations", tokenizer, Data(template="chatml")).head(0):
        record = sample.text.record
        assert learned(tokenizer, sample) == record["answer"] + "<|im_end|><|endoftext|>"
        assert sample.text.prompt == f"<|im_start|>user\n{record['question']}<|im_end|>\n<|im_start|>assistant\n"

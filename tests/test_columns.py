"""The folder of a tokenized data set: it is mapped and complete, and its name depends on all inputs."""

import json
import re
from dataclasses import fields
from datetime import date, timedelta

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from rows import write
from vocabularies import write_byte_level

from rlhf.config import Data
from rlhf.data import columns
from rlhf.data.columns import Columns, digest
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError


@pytest.fixture(scope="session")
def tokenizer(llama3):
    return llama3


def test_tokens_that_were_kept_are_mapped(tmp_path, tokenizer):
    """Every load maps the tokens, also the first one. Drawn samples are copies in memory."""
    file = write(tmp_path / "a.jsonl", {"prompt": "Q?"}, {"prompt": "Q!"})
    old = tmp_path / "cache" / "0.npz"  # written by earlier versions
    old.parent.mkdir()
    old.write_bytes(b"?")
    first, again = (Records.load(file, "prompts", tokenizer, Data(), cache=old.parent) for _ in range(2))
    for records in (first, again):
        for field in fields(Columns):
            array = getattr(records._columns[0][1], field.name)
            assert isinstance(array, np.memmap)
            assert not array.flags.writeable
        for sample in records.head(0):
            for array in (sample.tokens, sample.mask):
                assert type(array) is np.ndarray
                assert array.flags.owndata
                assert array.flags.writeable
    assert old.read_bytes() == b"?"
    nothing = Columns.of([], (0, 0, 3))
    columns.write(tmp_path / "nothing", nothing)
    found = columns.read(tmp_path / "nothing")
    for field in fields(Columns):
        kept, made = getattr(found, field.name), getattr(nothing, field.name)
        assert (kept.dtype, kept.tolist()) == (made.dtype, made.tolist())


def test_damaged_tokens_are_told(tmp_path, tokenizer):
    """Files that are cut, missing, of another kind or another data set, or that have one flipped bit, are reported."""
    file = write(tmp_path / "a.jsonl", {"prompt": "Q?"}, {"prompt": "what do they mean by it?"})
    cache = tmp_path / "cache"
    Records.load(file, "prompts", tokenizer, Data(), cache=cache)
    [kept] = cache.iterdir()
    whole = (kept / "tokens.npy").read_bytes()
    np.save(tmp_path / "short.npy", np.zeros(3, np.int32))
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (flipped, whole[:-4], whole[:40], b"", b"?" * 200, (tmp_path / "short.npy").read_bytes(), None):
        if damaged is None:
            (kept / "tokens.npy").unlink()
        else:
            (kept / "tokens.npy").write_bytes(damaged)
        with pytest.raises(
            UserError, match=re.escape(f"{kept}: cannot be read") + ".*; delete it, and the next run will write it"
        ):
            Records.load(file, "prompts", tokenizer, Data(), cache=cache)


def test_whoever_writes_tokens_second_leaves_the_first(tmp_path):
    """Several nodes may write the same folder at once: the first one stays, and nothing else is left."""
    made = Columns.of([], (0, 0, 0))
    for _ in range(2):
        columns.write(tmp_path / "cache" / "name", made)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["name"]
    assert len(columns.read(tmp_path / "cache" / "name")) == 0


def test_the_name_of_a_data_set_tells_all_that_decides_its_tokens(tmp_path, tokenizer, llama2, monkeypatch):
    file = write(tmp_path / "a.jsonl", {"prompt": "Q?"})
    other = write(tmp_path / "b.jsonl", {"prompt": "Q!"})
    changes = [
        Data(template="human"),
        Data(template="tokenizer"),
        Data(template_variables=("a=1",)),
        Data(learn="last"),
        Data(overlong="drop"),
        Data(max_tokens=7),
        Data(invalid="skip"),
    ]
    names = [digest(file, tokenizer, data, "grpo", 7) for data in (Data(), *changes)]
    names += [
        digest(file, tokenizer, Data(), "sft", 7),
        digest(file, tokenizer, Data(), "grpo", 8),
        digest(file, llama2, Data(), "grpo", 7),
    ]
    names += [digest(other, tokenizer, Data(), "grpo", 7), digest(tmp_path, tokenizer, Data(), "grpo", 7)]
    assert len(set(names)) == len(names)
    assert (
        names[0]
        == digest(file, tokenizer, Data(train="elsewhere"), "grpo", 7)
        == digest(write(file, {"prompt": "Q?"}), tokenizer, Data(), "grpo", 7)
    )
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "Q?"}]), table)
    names = [digest(table, tokenizer, Data()), digest(file, tokenizer, Data())]
    monkeypatch.setattr(pyarrow, "__version__", "0")  # it decides the text of a table's rows
    again = [digest(table, tokenizer, Data()), digest(file, tokenizer, Data())]
    assert [name == same for name, same in zip(names, again, strict=True)] == [False, True]


def test_a_config_that_changes_the_tokens_changes_the_name(tmp_path):
    """config.json has the stop tokens, which end what is learned, and the class of the tokenizer."""
    file, folder = write(tmp_path / "a.jsonl", {"prompt": "Q?"}), write_byte_level(tmp_path / "model")

    def named(**config):
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
        return digest(file, Tokenizer.load(folder), Data())

    first = named()
    assert first == named(rope_theta=1e6)
    assert len({first, named(eos_token_id=[400, 402]), named(model_type="qwen2")}) == 3


def test_the_date_counts_only_for_templates_that_may_write_it(tmp_path, monkeypatch):
    class Tomorrow(date):
        @classmethod
        def today(cls):
            return date.today() + timedelta(1)

    file = write(tmp_path / "a.jsonl", {"prompt": "Q?"})
    dated, undated = (
        Tokenizer.load(write_byte_level(tmp_path / str(i), template=template))
        for i, template in enumerate(("{{ strftime_now('%d') }}", "{{ messages }}"))
    )
    cases = [(t, Data(template=key)) for t in (dated, undated) for key in ("auto", "tokenizer", "chatml")]
    before = [digest(file, *case) for case in cases]
    monkeypatch.setattr(columns, "date", Tomorrow)
    changed = [name != digest(file, *case) for name, case in zip(before, cases, strict=True)]
    assert changed == [True, True, False, False, False, False]


def test_a_folder_that_cannot_be_written(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", {"prompt": "Q?"})
    with pytest.raises(UserError, match=r"cannot be written \(.*\); set out to a folder that has free space"):
        Records.load(file, "prompts", tokenizer, Data(), cache=file / "records")

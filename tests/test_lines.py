"""The files of a data set: jsonl, JSON arrays, tables, and folders of them."""

import gzip
import json
import re
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from rows import ASSISTANT, USER, write

from rlhf.config import Data
from rlhf.data import lines, tables
from rlhf.data.forms import ANSWER
from rlhf.data.records import Records
from rlhf.errors import UserError

PROMPTS = [{"prompt": text} for text in ("one", "two", 'a "quote"', "fünf 🙂", "{[,]}")]


@pytest.fixture(scope="session")
def tokenizer(llama3):
    return llama3


def load(path, tokenizer):
    return Records.load(path, "prompts", tokenizer, Data())


def texts(records):
    return [sample.text.prompt for sample in records.head(0)]


def test_files_and_folders(tmp_path, tokenizer):
    """Files of a folder are read in the order of their names. Blank lines and other files are skipped."""
    write(tmp_path / "b.jsonl.gz", {"prompt": "three"}, "", {"prompt": "four"})
    write(tmp_path / "a.jsonl", {"prompt": "one"}, "  ", {"prompt": "two"})
    write(tmp_path / "c.json", {"prompt": "fünf 🙂"})
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.jsonl").write_text("folders in it are not read")
    samples = Records.load(tmp_path, "prompts", tokenizer, Data()).head(0)
    assert [sample.text.prompt for sample in samples] == ["one", "two", "three", "four", "fünf 🙂"]
    assert [sample.text.row for sample in samples] == [0, 1, 2, 3, 4]
    assert [sample.group for sample in samples] == [0, 1, 2, 3, 4]
    assert len(Records.load(tmp_path / "b.jsonl.gz", "prompts", tokenizer, Data())) == 2


def test_errors_of_files(tmp_path, tokenizer):
    def fails(path, message):
        with pytest.raises(UserError, match=message) as caught:
            Records.load(path, "demonstrations", tokenizer, Data())
        assert str(path) in str(caught.value)

    fails(tmp_path / "nowhere.jsonl", "no such file or folder; give a jsonl, JSON or parquet file")
    fails(tmp_path, r"no file in this folder ends in .jsonl, ")
    fails(write(tmp_path / "empty.jsonl", "", " "), "has no records: it has no lines; set data.train")
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    fails(tmp_path / "plain.jsonl.gz", "cannot be read .*copy the file again")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x", "response": "y"}\n' * 9)[:-12])
    fails(tmp_path / "cut.jsonl.gz", "cannot be read .*copy the file again")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    fails(tmp_path / "latin.jsonl", r"latin.jsonl:1: not JSON")


@pytest.mark.parametrize("part", [5, 7, lines.PART])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl"])
def test_json_arrays(tmp_path, tokenizer, monkeypatch, part, indent, name):
    """An array is read in parts. The file may begin with a byte order mark, and its name does not matter."""
    monkeypatch.setattr(lines, "PART", part)
    text = "\ufeff \n" + json.dumps(PROMPTS, indent=indent, ensure_ascii=bool(indent)) + "\n"
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    records = load(file, tokenizer)
    assert [sample.text.record for sample in records.head(0)] == PROMPTS
    assert [sample.text.row for sample in records.head(0)] == [0, 1, 2, 3, 4]
    assert [where for where, _ in lines.read(file)] == [f"{file}: element {n}" for n in range(1, 6)]


@pytest.mark.parametrize("part", [7, lines.PART])
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[]", "has no records: it has no lines"),
        ('[{"prompt": "one"}, 3]', "a.json: element 2: not an object but 3"),
        ('[{"prompt": "one"}, {"text": "two"}]', "a.json: element 2: the line has the keys 'text'; give it 'prompt'"),
        ('[{"prompt": "one"}, {"prompt"}]', "a.json: element 2: the array is not JSON here (Expecting ':' delimiter)"),
        ('[{"prompt": "one"}, {"prompt": "tw', "a.json: element 2: the array is not JSON here (Unterminated string"),
        ('[{"prompt": "one"}', "a.json: element 1: the array is not JSON here (Expecting ',' or ']'); correct it"),
        ('[{"prompt": "one"},]', "a.json: element 2: the array is not JSON here (Expecting value)"),
        ('[{"prompt": "one"}]]', "a.json: element 2: the array is not JSON here (text follows the array)"),
        ("[" * 100_000, "a.json: element 1: the array is not JSON here (it is nested too deeply)"),
        ('[{"prompt": "\udce9"}]', "a.json: element 1: the array is not JSON here ('utf-8' codec can't decode"),
        ('{\n  "prompt": "one"\n}\n', "a.json:1: not JSON (Expecting property name enclosed in double quotes"),
    ],
)
def test_errors_of_json_arrays(tmp_path, tokenizer, monkeypatch, part, text, error):
    monkeypatch.setattr(lines, "PART", part)
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=re.escape(error)):
        load(tmp_path / "a.json", tokenizer)


def as_stream(file, table, rows=2):
    """Write an Arrow file as datasets does: a stream of batches."""
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows)


def as_file(file, table):
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize(
    ("name", "write_table"),
    [
        ("a.parquet", lambda file, table: parquet.write_table(table, file, row_group_size=3)),
        ("a.arrow", as_stream),
        ("a.arrow", as_file),
    ],
)
def test_tables(tmp_path, tokenizer, monkeypatch, name, write_table):
    """A row is an object with all columns. Values that JSON does not have become texts or numbers."""
    monkeypatch.setattr(tables, "ROWS", 2)
    given = [
        {
            "prompt": row["prompt"],
            "answer": answer,
            "when": date(2024, 2, n + 1),
            "price": Decimal("0.5"),
            "tags": ["x"],
        }
        for n, (row, answer) in enumerate(zip(PROMPTS, ["4", None, "5", "6", "7"], strict=True))
    ]
    write_table(tmp_path / name, pyarrow.Table.from_pylist(given))
    records = load(tmp_path / name, tokenizer)
    assert texts(records) == [row["prompt"] for row in PROMPTS]
    expected = [row | {"when": f"2024-02-0{n + 1}", "price": 0.5} for n, row in enumerate(given)]
    assert [sample.text.record for sample in records.head(0)] == expected
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}: row 2: no 'answer', which the reward needs")):
        Records.load(tmp_path / name, "prompts", tokenizer, Data(), required=(ANSWER,))


def test_a_table_is_read_like_the_same_lines(tmp_path, tokenizer):
    """Messages, pairs and scores are the same, whatever file they are in. So are the draws."""
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]
    given = [{"conversations": turns, "system": system, "n": n} for n, system in enumerate(["S.", None, ""])]
    write(tmp_path / "a.jsonl", *given)
    (tmp_path / "a.json").write_text(json.dumps(given))
    parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "a.parquet")
    found = [
        Records.load(tmp_path / f"a.{kind}", "demonstrations", tokenizer, Data(template="human"))
        for kind in ("jsonl", "json", "parquet")
    ]
    for step in range(3):
        first, *others = ([(s.tokens.tolist(), s.mask.tolist(), s.text) for s in r.draw(step, 2, 1)] for r in found)
        assert others == [first, first]


def test_a_table_adds_no_keys_to_objects(tmp_path):
    """All structs of a column have the same fields. Fields that an object does not have are left out again."""
    calls = [{"name": "a", "arguments": {"city": "x", "days": [{"n": 1}, {}]}}, {"name": "b", "arguments": {"m": 2}}]
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "4"}]
    given = [{"messages": [*turns, ASSISTANT], "answer": None}, {"messages": [USER, ASSISTANT], "answer": [4, None]}]
    parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "a.parquet")
    del turns[1]["content"]
    assert [json.loads(line) for _, line in lines.read(tmp_path / "a.parquet")] == given


def test_errors_of_tables(tmp_path, tokenizer, monkeypatch):
    def fails(path, error):
        with pytest.raises(UserError, match=re.escape(f"{path}: {error}")):
            load(path, tokenizer)

    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "Q?"}, {"prompt": ""}]), tmp_path / "a.parquet")
    fails(tmp_path / "a.parquet", "row 2: 'prompt' is empty; give it a text or remove the line")
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "Q?", "image": b"?"}]), tmp_path / "b.parquet")
    fails(tmp_path / "b.parquet", "row 1 has a value of type bytes, which JSON cannot hold; remove its column, or")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-9])
    fails(tmp_path / "cut.parquet", "cannot be read (")
    for name, content in (("empty.parquet", b""), ("empty.arrow", b""), ("text.arrow", b"{}" * 99)):
        (tmp_path / name).write_bytes(content)
        fails(tmp_path / name, "cannot be read (")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(
            UserError, match=r"a.parquet: .parquet files need the package pyarrow: pip install pyarrow$"
        ):
            Records.load(tmp_path / "a.parquet", "prompts", tokenizer, Data(), cache=cache)


def saved(folder, *parts):
    """Write a folder as save_to_disk of datasets 5.2.0 does: the same files, with the same keys."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(parts):05}.arrow" for n in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        as_stream(folder / name, pyarrow.Table.from_pylist(part))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "8d8bc2270ed07d02"}
    state |= dict.fromkeys(("_format_columns", "_format_type", "_split")) | {"_format_kwargs": {}}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text('{"features": {"prompt": {"dtype": "string", "_type": "Value"}}}')
    return folder


def test_folders_that_datasets_saved(tmp_path, tokenizer):
    whole = saved(tmp_path / "whole", PROMPTS[:2], PROMPTS[2:])
    assert texts(load(whole, tokenizer)) == [row["prompt"] for row in PROMPTS]
    splits = tmp_path / "splits"
    saved(splits / "train", PROMPTS)
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert texts(load(splits, tokenizer)) == [row["prompt"] for row in PROMPTS]
    saved(splits / "test", PROMPTS[:1])
    with pytest.raises(UserError, match=f"it has the splits test, train; give one of them, such as {splits}/train$"):
        load(splits, tokenizer)
    assert len(load(splits / "test", tokenizer)) == 1
    for state, error in (
        ("{}", "it names no data files; save the data set again with save_to_disk"),
        ("[3]", "it names no data files"),
        ("{", "not JSON ("),
        (
            '{"_data_files": [{"filename": "lost.arrow"}]}',
            "no such file, but state.json names it; copy the folder again",
        ),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}', "saved as a selection of rows"),
    ):
        (whole / "state.json").write_text(state)
        with pytest.raises(UserError, match=re.escape(error)):
            load(whole, tokenizer)


def test_folders_of_the_hub(tmp_path, tokenizer):
    """One folder with data within a folder is read. Of several splits or folders, the user gives one."""
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "dataset_infos.json").write_text("{}")
    as_stream(data / "cache-8d8bc2270ed07d02.arrow", pyarrow.Table.from_pylist(PROMPTS))  # not the data set itself
    for n, part in enumerate((PROMPTS[:2], PROMPTS[2:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), data / f"train-0000{n}-of-00002.parquet")
    assert texts(load(tmp_path, tokenizer)) == [row["prompt"] for row in PROMPTS]
    parquet.write_table(pyarrow.Table.from_pylist(PROMPTS[:1]), data / "test-00000-of-00001.parquet")
    with pytest.raises(
        UserError, match=re.escape(f"the splits train, test; give those of one, such as {data}/*train*")
    ):
        load(tmp_path, tokenizer)
    assert len(load(data / "*train*", tokenizer)) == 5
    assert len(load(data / "test-*", tokenizer)) == 1
    with pytest.raises(
        UserError, match=re.escape(f"{data}/dev-*: no data file has such a name; give a jsonl, JSON or")
    ):
        load(data / "dev-*", tokenizer)
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "a.jsonl", *PROMPTS)
    with pytest.raises(UserError, match=f"it has the folders data, more; give one of them, such as {tmp_path}/data$"):
        load(tmp_path, tokenizer)
    write(data / "a.jsonl", *PROMPTS)
    with pytest.raises(
        UserError, match=re.escape(f"it has .jsonl and .parquet files; give one kind, such as {data}/*.p")
    ):
        load(data, tokenizer)


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["a.arrow", "a.parquet"], "it has .arrow and .parquet files; give one kind, such as {folder}/*.parquet"),
        (["a.arrow", "b.jsonl", "c.parquet"], "it has .arrow and .jsonl and .parquet files; give one kind"),
        (["a.jsonl", "a.jsonl.gz"], "a.jsonl and a.jsonl.gz differ only in the suffix, so both may have the same"),
        (["a.json", "a.jsonl"], "a.json and a.jsonl differ only in the suffix, so both may have the same records; m"),
        (["a.json", "b.json.gz", "c.jsonl"], None),
    ],
)
def test_records_are_not_read_twice(tmp_path, names, error):
    for name in names:
        write(tmp_path / name, *PROMPTS)
    for path in (tmp_path, tmp_path / "*"):
        if error is None:
            assert [file.name for file in lines.files(path)] == names
            continue
        with pytest.raises(UserError, match=re.escape(f"data set {tmp_path}: {error.format(folder=tmp_path)}")):
            lines.files(path)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.jsonl", "dev.jsonl"], "train, dev"),
        (["x_training.json", "x_evaluation.json"], "train, eval"),
        (["gsm8k-train.jsonl", "gsm8k-testing.jsonl.gz"], "train, test"),
        (["validation.jsonl", "test.jsonl"], "test, val"),
        (["train.jsonl", "Test.jsonl"], "train, Test"),
        (["TRAIN.jsonl", "eval.jsonl"], "TRAIN, eval"),
        (["validation-0.jsonl", "dev-1.jsonl"], None),
        (["train_a.jsonl", "train_b.jsonl", "other.jsonl"], None),
        (["contest.jsonl", "trainer.jsonl", "devices.jsonl"], None),
    ],
)
def test_splits_are_not_mixed(tmp_path, names, splits):
    for name in names:
        write(tmp_path / name, *PROMPTS)
    if splits is None:
        assert [file.name for file in lines.files(tmp_path)] == sorted(names)
        return
    remedy = re.escape(f"such as {tmp_path}/*{splits.split(', ')[0]}*")
    with pytest.raises(UserError, match=f"it has files of the splits {splits}; give those of one, {remedy}"):
        lines.files(tmp_path)


def test_files_that_are_not_read(tmp_path, monkeypatch):
    for name in ("a.csv", "a.tsv", "a.jsonl.zst"):
        (tmp_path / name).write_text("prompt\none\n")
        for path in (tmp_path / name, tmp_path):
            error = f"{tmp_path / name}: {Path(name).suffix} files are not read; convert it to jsonl, JSON or parquet"
            with pytest.raises(UserError, match=re.escape(error)):
                lines.files(path)
        (tmp_path / name).unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"set openai/gsm8k: .*download it: hf download openai/gsm8k --repo-type dataset --local-dir o"
    ):
        lines.files(Path("openai/gsm8k"))

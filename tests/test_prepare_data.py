"""tools/prepare_data.py on small and on real public files: every line that it writes is a record of its mode."""

import io
import json
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from rows import first_lines, learned, whole, write

from rlhf.algorithms import ALGORITHMS
from rlhf.config import Data
from rlhf.data import forms, lines
from rlhf.data.forms import ANSWER
from rlhf.data.records import Records
from rlhf.errors import told
from rlhf.rewards.answers import verify

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import prepare_data

MODES = {"sft": "sft", "reward": "reward", "dpo": "dpo", "alignment": "rlhf", "math": "grpo"}
FORMS = {"text": "plain", "messages": "human"}  # how conversations are written, and the template for them


def run(*arguments):
    """Return the exit code and the output of the tool."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = told("prepare_data", lambda: prepare_data.main([str(argument) for argument in arguments]))
    return code, said.getvalue()


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def load(file, mode, tokenizer, template, **more):
    return Records.load(
        file, ALGORITHMS[mode].form, tokenizer, Data(template=template, max_tokens=10**5, learn="last"), **more
    )


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Four?\n\nAssistant: Yes.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Four?\n\nAssistant:  No.",
}
ASKED = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Four?\n\nAssistant:"


def test_hh_as_text(tmp_path):
    """These are the files of the tutorial."""
    write(tmp_path / "in.jsonl", HH)
    command = [sys.executable, prepare_data.__file__, "hh", "--from", tmp_path / "in.jsonl", "--to", tmp_path]
    assert (
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.count(
            "       1 lines in "
        )
        == 4
    )
    assert rows(tmp_path / "sft/train.jsonl") == [{"query": ASKED, "response": " Yes."}]
    assert rows(tmp_path / "reward/train.jsonl") == [
        {"query": ASKED, "response": [" Yes.", "  No."], "score": [1.0, 0.0]}
    ]
    assert rows(tmp_path / "dpo/train.jsonl") == [{"prompt": ASKED, "chosen": " Yes.", "rejected": "  No."}]
    assert rows(tmp_path / "alignment/train.jsonl") == [{"prompt": ASKED}]


def test_hh_as_messages(tmp_path):
    write(tmp_path / "in.jsonl", HH)
    assert run("hh", "--from", tmp_path / "in.jsonl", "--to", tmp_path, "--as", "messages")[0] == 0
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Four?")]
    asked = [{"role": role, "content": content} for role, content in turns]
    said = [{"role": "assistant", "content": text} for text in ("Yes.", " No.")]
    assert rows(tmp_path / "sft/train.jsonl") == [{"messages": [*asked, said[0]]}]
    assert rows(tmp_path / "reward/train.jsonl") == [
        {"query": asked, "response": ["Yes.", " No."], "score": [1.0, 0.0]}
    ]
    assert rows(tmp_path / "dpo/train.jsonl") == [{"prompt": asked, "chosen": said[:1], "rejected": said[1:]}]
    assert rows(tmp_path / "alignment/train.jsonl") == [{"prompt": asked}]


def test_lines_of_hh_that_are_left_out(tmp_path):
    def pair(chosen, rejected, prompt="\n\nHuman: Q?\n\nAssistant:"):
        return {"chosen": prompt + chosen, "rejected": prompt + rejected}

    twice = pair(" Yes.", " No.", "\n\nHuman: Hi\n\nHuman: Four?\n\nAssistant:")
    lines = [
        pair(" Yes.", " No."),
        pair(" ", " No."),
        pair(" Yes.", ""),
        pair(" Yes.", " Yes."),
        {"chosen": HH["chosen"], "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
        twice,
        pair(" Yes.", " No.", "Hi\n\nAssistant:"),
    ]
    write(tmp_path / "in.jsonl", *lines)
    for form, kept in (
        ("text", 1),
        ("messages", 0),
    ):  # two turns of one speaker in a row are possible as text, but not as messages
        code, said = run("hh", "--from", tmp_path / "in.jsonl", "--to", tmp_path / form, "--as", form)
        counts = {
            kind: len(rows(tmp_path / form / kind / "train.jsonl")) for kind in ("sft", "reward", "dpo", "alignment")
        }
        assert (code, counts) == (0, {"sft": 4 + kept, "reward": 1 + kept, "dpo": 1 + kept, "alignment": 2 + kept})
        assert " 2 omitted from dpo: a response is empty\n" in said
        assert " 1 omitted from reward: the responses are the same\n" in said
        assert " 1 omitted from dpo: the conversations differ before the last turn\n" in said
        assert " 3 omitted from alignment: the prompt occurred before\n" in said
        assert f" {2 - kept} omitted from sft: the roles do not alternate\n" in said


def test_folders_and_what_is_held_out(tmp_path):
    """Files named test are held out.

    --dev holds out a share of the other prompts, in any order, with all lines of a prompt.
    """
    lines = [{"question": f"What is {n % 200} + 1?", "answer": f"{n}\n#### {n + 1}"} for n in range(400)]
    (tmp_path / "in" / "main").mkdir(parents=True)
    write(tmp_path / "in" / "main" / "train.jsonl", *lines)
    write(tmp_path / "in" / "main" / "test-00.jsonl.gz", {"question": "Four?", "answer": "#### 4"})
    write(tmp_path / "in" / "latest.jsonl", {"question": "Five?", "answer": "#### 5"})
    (tmp_path / "in" / "README.md").write_text("no data")
    assert run("gsm8k", "--from", tmp_path / "in", "--to", tmp_path / "a", "--dev", "0.2", "--seed", 7)[0] == 0
    write(tmp_path / "in" / "main" / "train.jsonl", *lines[::-1])
    assert run("gsm8k", "--from", tmp_path / "in", "--to", tmp_path / "b", "--dev", "0.2", "--seed", 7)[0] == 0
    assert run("gsm8k", "--from", tmp_path / "in", "--to", tmp_path / "c", "--dev", "0.2", "--seed", 8)[0] == 0
    assert run("gsm8k", "--from", tmp_path / "in", "--to", tmp_path / "d")[0] == 0
    prompts = {}
    for run_name in "abcd":
        for part in ("train", "dev"):
            prompts[run_name, part] = Counter(
                row["prompt"] for row in rows(tmp_path / run_name / "math" / f"{part}.jsonl")
            )
    assert prompts["a", "dev"] == prompts["b", "dev"] != prompts["c", "dev"]
    assert not prompts["a", "train"].keys() & prompts["a", "dev"].keys()
    assert prompts["d", "dev"] == {"\n\nHuman: Four?\n\nAssistant:": 1} == prompts["d", "dev"] & prompts["a", "dev"]
    assert 40 < prompts["a", "dev"].total() < 130


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train/data-00000-of-00001.jsonl", "train"),  # the folders of a DatasetDict
        ("test/data-00000-of-00001.jsonl", "dev"),
        ("Validation/0000.jsonl", "dev"),
        ("val-00000-of-00001.jsonl", "dev"),
        ("eval_0.jsonl", "dev"),
        ("main.test.jsonl", "dev"),
        ("eval/train.jsonl", "train"),  # the name of the file decides
        ("latest/contest.jsonl", "train"),
    ],
)
def test_the_split_is_in_the_name_of_the_file_or_its_folder(tmp_path, name, part):
    (tmp_path / "in" / name).parent.mkdir(parents=True)
    write(tmp_path / "in" / name, {"question": "Four?", "answer": "#### 4"})
    assert run("gsm8k", "--from", tmp_path / "in", "--to", tmp_path / "out")[0] == 0
    assert [file.name for file in (tmp_path / "out" / "math").iterdir()] == [f"{part}.jsonl"]


def test_records_are_not_read_twice(tmp_path):
    for folder in ("main", "socratic"):  # files of one name in two folders are others
        (tmp_path / "in" / folder).mkdir(parents=True)
        write(tmp_path / "in" / folder / "train.jsonl", {"question": "Four?", "answer": "#### 4"})
    assert run("gsm8k", "--from", tmp_path / "in", "--to", tmp_path / "out")[0] == 0
    write(tmp_path / "in" / "main" / "train.jsonl.gz", {"question": "Four?", "answer": "#### 4"})
    code, said = run("gsm8k", "--from", tmp_path / "in", "--to", tmp_path / "out")
    assert code == 2
    assert "in/main: train.jsonl and train.jsonl.gz differ only in the suffix" in said


@pytest.mark.parametrize(
    ("arguments", "line", "error"),
    [
        (["hh"], {"prompt": "x"}, "in.jsonl:1: this line has no text 'chosen'"),
        (["gsm8k"], {"question": "x", "answer": 3}, "in.jsonl:1: this line has no text 'answer'"),
        (["mtbench"], {"turns": "x"}, "in.jsonl:1: this line has no list of texts 'turns'"),
        (["mtbench"], {"turns": [{}]}, "in.jsonl:1: this line has no list of texts 'turns'"),
        (["gsm8k"], '{"question": "\\ud800", "answer": "#### 3"}', "in.jsonl:1: half of a surrogate pair is in it"),
        (
            ["gsm8k", "--dev", "x"],
            HH,
            "argument --dev: invalid float value: 'x'; see ./launch.sh prepare_data --help",
        ),
        (["hh"], "{", "in.jsonl:1: not JSON"),
        (["hh", "--dev", "5"], HH, "--dev=5 is not a share of the prompts: give a number from 0 to below 1"),
    ],
)
def test_mistakes(tmp_path, arguments, line, error):
    task, *more = arguments
    code, said = run(task, "--from", write(tmp_path / "in.jsonl", line), "--to", tmp_path / "out", *more)
    assert (code, len(said.splitlines())) == (2, 1)
    assert said.startswith("prepare_data: ")
    assert error in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "math").touch()
    code, said = run(
        "gsm8k", "--from", write(tmp_path / "in.jsonl", {"question": "Four?", "answer": "#### 4"}), "--to", tmp_path
    )
    assert (code, said) == (2, f"prepare_data: {tmp_path}/math: File exists\n")


@pytest.fixture(scope="module", params=FORMS)
def prepared(request, tmp_path_factory, shared_data):
    """Return (folder, template) of all real files, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("prepared")
    tasks = {"hh_harmless_test.jsonl.gz": "hh", "gsm8k_test.jsonl.gz": "gsm8k", "gsm8k_train_2000.jsonl.gz": "gsm8k"}
    tasks["mt_bench_question.jsonl"] = "mtbench"
    assert tasks.keys() <= {file.name for file in shared_data.iterdir()}, "what else is there is for judges"
    for name, task in tasks.items():
        code, said = run(task, "--from", shared_data / name, "--to", folder / name, "--as", request.param)
        assert code == 0, said
    return folder, FORMS[request.param]


def head(file, count):
    """Write the first lines of a file, because the tokenizers of the tests are slow."""
    return write(file.with_name("head.jsonl"), *rows(file)[:count])


def test_every_line_of_the_real_files_has_a_form_of_its_mode(prepared, llama2):
    folder, template = prepared
    files = sorted(folder.glob("*/*/*.jsonl"))
    assert len(files) == 4 + 2 + 2 + 1
    for file in files:
        mode = MODES[file.parent.name]
        form = ALGORITHMS[mode].form
        required = (ANSWER,) if mode == "grpo" else ()
        for _, line in lines.read(file):
            assert len(forms.read(line, form, required).told) == (2 if form in forms.COMPARED else 1)
        records = load(head(file, 50), mode, llama2, template, required=required)
        assert len(records) == 50
        assert all(sample.mask.any() == (mode in ("sft", "reward", "dpo")) for sample in records.head(0))


def test_real_hh(prepared, llama2, shared_data):
    """Of 2,312 lines, 4 end with two turns of the assistant and 4 more have two in a row.

    4 have an empty response, and 1 has two prompts.
    """
    folder, template = prepared
    folder = folder / "hh_harmless_test.jsonl.gz"
    counts = {kind: len(rows(folder / kind / "train.jsonl")) for kind in ("sft", "reward", "dpo", "alignment")}
    some = 0 if template == "plain" else 4
    assert counts == {"sft": 2304 - some, "reward": 2303 - some, "dpo": 2303 - some, "alignment": 2306 - some}
    texts = {row["chosen"]: row["rejected"] for row in first_lines(shared_data / "hh_harmless_test.jsonl.gz", 10**6)}
    pairs = load(head(folder / "dpo/train.jsonl", 200), "dpo", llama2, template).head(0)
    for chosen, rejected in zip(pairs[::2], pairs[1::2], strict=True):
        better, worse = (llama2.decode(sample.tokens) for sample in (chosen, rejected))
        assert texts[better] == worse, "written again, the dialogues are what they were"
    prompts = load(head(folder / "alignment/train.jsonl", 200), "rlhf", llama2, template).head(0)
    assert all(llama2.decode(sample.tokens).endswith("\n\nAssistant:") for sample in prompts)


def test_real_gsm8k(prepared, llama2, shared_data):
    folder, template = prepared
    folder = folder / "gsm8k_test.jsonl.gz"
    assert len(rows(folder / "math/train.jsonl")) == len(rows(folder / "sft/train.jsonl")) == 1319
    math = load(head(folder / "math/train.jsonl", 200), "grpo", llama2, template, required=(ANSWER,)).head(0)
    sft = load(head(folder / "sft/train.jsonl", 200), "sft", llama2, template).head(0)
    for row, prompt, solution in zip(first_lines(shared_data / "gsm8k_test.jsonl.gz", 200), math, sft, strict=True):
        assert llama2.decode(prompt.tokens) == f"\n\nHuman: {row['question']}\n\nAssistant:"
        assert whole(llama2, solution).endswith(f"{row['question']}\n\nAssistant: {row['answer']}</s>")
        assert prompt.text.record["eval_func"] == "math_rule"
        assert verify(learned(llama2, solution).removesuffix("</s>"), prompt.text.record["answer"]) == 1.0

"""Convert downloaded public data sets into the files that the modes read.

./launch.sh prepare_data TASK --from PATH --to FOLDER

Each task writes FOLDER/KIND/train.jsonl and dev.jsonl. KIND is the purpose of the files:

    TASK     data set                                          KIND
    hh       conversations of Anthropic's HH-RLHF (2204.05862)  sft, reward, dpo, alignment
    gsm8k    problems of GSM8K (2110.14168)                     sft, math
    mtbench  first questions of MT-Bench (2306.05685)           alignment, all held out

alignment has prompts for rlhf, online-dpo and grpo. math has prompts and answers for grpo with the math verifier.

PATH is a file, or a folder that is searched recursively for data files (docs/data.md). In a folder, the files of a test
or validation split are held out. The name of the file has the split, such as test, dev or val, or that of its folder.
--dev holds out a share of the other prompts, too. --as selects how conversations are written: as text with HH's markers
"Human:" and "Assistant:", for data.template=auto or plain; or as messages, for all other templates. Text with template
plain and messages with template human give the same tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlhf import folders, output, texts
from rlhf.data import forms, lines
from rlhf.errors import UserError, told

Row = dict[str, Any]
Text = str | list[Row]  # a conversation with HH's markers, or messages
Made = tuple[str, dict[str, Row | str]]  # the prompt; KIND -> the line to write, or the reason why there is none
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def hh(row: Row, as_text: bool) -> Made:
    """Convert a line of HH-RLHF.

    chosen and rejected are whole conversations that differ in the assistant's last turn. Prompts and demonstrations
    come from chosen.
    """
    (prompt, _, better), (other, _, worse) = (_text(row, key).rpartition(ASSISTANT) for key in ("chosen", "rejected"))
    turns = _turns(prompt)
    if not turns or not (as_text or _alternate(turns)):
        return prompt, dict.fromkeys(("sft", "reward", "dpo", "alignment"), "the roles do not alternate")
    asked: Text = prompt + ASSISTANT if as_text else turns
    responses = [said if as_text else said.removeprefix(" ") for said in (better, worse)]
    made: dict[str, Row | str] = {"alignment": {"prompt": asked}}
    made["sft"] = _demonstration(asked, responses[0]) if better.strip() else "the response is empty"
    why_not = {
        "the conversations differ before the last turn": prompt != other,
        "a response is empty": not (better.strip() and worse.strip()),
        "the responses are the same": better == worse,
    }
    if reasons := [why for why, holds in why_not.items() if holds]:
        return prompt, made | {"reward": reasons[0], "dpo": reasons[0]}
    made["reward"] = {"query": asked, "response": responses, "score": [1.0, 0.0]}
    made["dpo"] = {"prompt": asked} | {
        key: _said(text, as_text) for key, text in zip(("chosen", "rejected"), responses, strict=True)
    }
    return prompt, made


def gsm8k(row: Row, as_text: bool) -> Made:
    """Convert a line of GSM8K. Its answer is a whole solution, with the number after ####."""
    question, solution = _text(row, "question"), _text(row, "answer")
    asked, answer = _question(question, as_text), solution.partition("####")[2].strip()
    math: Row | str = (
        {"eval_func": "math_rule", "prompt": asked, "answer": answer} if answer else "no answer after ####"
    )
    return question, {"math": math, "sft": _demonstration(asked, f" {solution}" if as_text else solution)}


def mtbench(row: Row, as_text: bool) -> Made:
    """Convert a line of MT-Bench. Only the first of its two turns is used. The other keys are kept."""
    if not isinstance(row.get("turns"), list) or not row["turns"] or not isinstance(row["turns"][0], str):
        raise UserError("this line has no list of texts 'turns', but this data set needs it: check the task and --from")
    question = row["turns"][0]
    return question, {"alignment": {"prompt": _question(question, as_text), **row}}


TASKS: dict[str, Callable[[Row, bool], Made]] = {"hh": hh, "gsm8k": gsm8k, "mtbench": mtbench}


def _text(row: Row, key: str) -> str:
    if not isinstance(row.get(key), str):
        raise UserError(f"this line has no text {key!r}, but this data set needs it: check the task and --from")
    return row[key]


def _question(text: str, as_text: bool) -> Text:
    return f"{HUMAN} {text}{ASSISTANT}" if as_text else [{"role": "user", "content": text}]


def _demonstration(asked: Text, response: str) -> Row:
    if isinstance(asked, str):
        return {"query": asked, "response": response}
    return {"messages": [*asked, {"role": "assistant", "content": response}]}


def _said(text: str, as_text: bool) -> Text:
    return text if as_text else [{"role": "assistant", "content": text}]


def _turns(dialogue: str) -> list[Row]:
    """Return the messages of a conversation, or [] if it does not begin and end with the human."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    if before or not parts or not parts[0] == parts[-2] == "Human":
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.removeprefix(" ")}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _alternate(turns: list[Row]) -> bool:
    """Return whether a template accepts the messages: each has text, and the roles alternate."""
    return all(turn["role"] == ("user", "assistant")[i % 2] and turn["content"].strip() for i, turn in enumerate(turns))


def sources(path: Path) -> Iterator[tuple[Path, bool]]:
    """Return the files to read, sorted by name, and whether each is held out."""
    if not path.is_dir():
        yield from ((file, False) for file in lines.files(path))
        return
    found = lines.readable(file for file in path.rglob("*") if file.is_file())
    found = [file for file in found if "red-team-attempts" not in file.parts]  # part of HH-RLHF, but not preferences
    if not found:
        raise UserError(f"--from {path}: no file in this folder ends in {', '.join(lines.SUFFIXES)}")
    for folder in dict.fromkeys(file.parent for file in found):
        lines.of_one_kind(folder, [file for file in found if file.parent == folder])
    for file in found:
        splits = map(lines.split, reversed(file.relative_to(path).parts))  # the file's own name comes first
        yield file, next(filter(None, splits), "train") != "train"


def is_in(share: float, prompt: str, seed: int) -> bool:
    """Return whether a prompt is held out. It depends only on the prompt and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8]) < share * 2**64


def prepare(
    task: str, source: Path, *, as_text: bool = True, dev: float = 0.0, seed: int = 1
) -> tuple[dict[Path, bytes], Counter]:
    """Return the lines of each file, and the number of omitted lines by (kind, reason).

    A prompt that occurs in several lines gives one line of kind alignment. Raises UserError with file:line.
    """
    files: dict[Path, list[bytes]] = {}
    left_out: Counter = Counter()
    seen: set[str] = set()
    for file, held_out in sources(source):
        for where, line in lines.read(file):
            try:
                prompt, made = TASKS[task](forms.parse(line), as_text)
                part = "dev.jsonl" if held_out or task == "mtbench" or is_in(dev, prompt, seed) else "train.jsonl"
                written = {kind: _line(content) for kind, content in made.items() if not isinstance(content, str)}
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            except UnicodeEncodeError:
                raise UserError(f"{where}: half of a surrogate pair is in it; remove it") from None
            if "alignment" in made and prompt in seen:
                made["alignment"] = "the prompt occurred before"
            seen.add(prompt)
            for kind, content in made.items():
                if isinstance(content, str):
                    left_out[kind, content] += 1
                else:
                    files.setdefault(Path(kind, part), []).append(written[kind])
    return {name: b"".join(held) for name, held in files.items()}, left_out


def _line(content: Row) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def write(path: Path, content: bytes) -> None:
    """Write a file. After an interruption it is either complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with folders.writing(partial) as file:
        file.write(content)
    partial.replace(path)


def main(arguments: list[str]) -> int:
    """Run the command. Returns the exit code 0. Raises UserError, or OSError with a path."""
    parser = texts.Parser(
        prog="./launch.sh prepare_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="PATH", help="file or folder to read"
    )
    parser.add_argument("--to", dest="target", type=Path, required=True, metavar="FOLDER", help="folder to write to")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("text", "messages"),
        default="text",
        help="how conversations are written (default: text)",
    )
    parser.add_argument(
        "--dev", type=float, default=0.0, metavar="SHARE", help="share of the prompts to hold out (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=1, help="decides which prompts are held out (default: 1)")
    given = parser.parse_args(arguments)
    if not 0 <= given.dev < 1:
        raise UserError(f"--dev={given.dev:g} is not a share of the prompts: give a number from 0 to below 1")
    files, left_out = prepare(given.task, given.source, as_text=given.form == "text", dev=given.dev, seed=given.seed)
    for name, content in sorted(files.items()):
        write(given.target / name, content)
        lines = content.count(b"\n")
        print(f"{lines:8} lines in {given.target / name}")
    for (kind, why), count in sorted(left_out.items()):
        print(f"{count:8} omitted from {kind}: {why}")
    return 0


if __name__ == "__main__":
    output.secure()
    sys.exit(told("prepare_data", lambda: main(sys.argv[1:])))

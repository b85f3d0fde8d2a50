"""lm-evaluation-harness on a converted folder: its numbers are those of our tokenizer, template and engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import models
import torch
from test_engines import plain
from transformers import AutoModelForCausalLM
from vocabularies import CHATML, LINES, write_byte_level

from rlhf import convert
from rlhf.contracts import Sampling
from rlhf.data.tokenizer import Tokenizer
from rlhf.model import architecture
from rlhf.rollout.kvcache import KVCache

NUM = 12
CHOICES = ["Yes.", "No.", "It is raining.", "The answer is four."]
TOKENS = 8  # limit of a response
TASKS = {
    "choose": """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
""",
    "write": """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: wanted
generation_kwargs: {until: ["<|im_end|>"], do_sample: false, max_gen_toks: TOKENS}
""",
}


def make(root: Path) -> Path:
    """Write a folder as runs export it: random weights, and a chat template that begins with the bos."""
    models.make("llama3-tied", root / "model")
    write_byte_level(root / "model", bos="<|begin|>", template="{{- bos_token }}\n" + CHATML)
    for source, target, form in (("model", "mcore", "mcore"), ("mcore", "hf", "hf")):
        arguments = ["--from", root / source, "--to", root / target, "--format", form, "--config", root / "model"]
        convert.main([str(argument) for argument in arguments])
    return root / "hf"


def likelihood(engine: KVCache, prompt: list[int], response: list[int]) -> float:
    """Return the log-probability of a response."""
    tokens, arch = torch.tensor([prompt + response]), engine.arch
    cache = torch.zeros(arch.layers, 2, 1, tokens.shape[1], arch.kv_heads, arch.head_dim)
    hidden = engine.forward(tokens, torch.arange(tokens.shape[1])[None], cache)[0, len(prompt) - 1 : -1]
    return float(engine.logits(hidden).log_softmax(-1).gather(1, tokens[0, len(prompt) :, None]).sum())


def harness(root: Path, folder: Path) -> tuple[dict, dict[str, list[dict]]]:
    """Run lm_eval on root/tasks without a network. Return the results and the samples of each task."""
    command = ["run", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(root / "tasks"), "--batch_size", "4"]
    command += ["--apply_chat_template", "--log_samples", "--output_path", str(root / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(root / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command],
        cwd=root,
        env={**os.environ, **offline, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (results,) = root.glob("out/*/results_*.json")
    samples = {}
    for task in TASKS:
        (file,) = root.glob(f"out/*/samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(results.read_text())["results"], samples


@torch.no_grad()
def test_lm_eval_has_our_numbers(tmp_path):
    """Log-likelihoods of choices and greedy responses, with the chat template; the bos is not doubled.

    A third of the wanted answers are not the model's, so both scores are 2/3.
    """
    folder = make(tmp_path)
    tokenizer = Tokenizer.load(folder)
    engine = plain(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), architecture.read(folder))
    questions = [f"{LINES[i % 8]} {i}" for i in range(NUM)]
    prompts = [tokenizer.chat([{"role": "user", "content": question}], cue=True) for question in questions]
    assert all(prompt.count(tokenizer.bos) == 1 for prompt in prompts)
    newline = tokenizer.encode("\n", continues=True)
    assert all(prompt[-1:] == newline for prompt in prompts)
    values = [  # lm_eval counts the white space at the end of a prompt as part of the choice
        [likelihood(engine, prompt[:-1], newline + tokenizer.encode(choice, continues=True)) for choice in CHOICES]
        for prompt in prompts
    ]
    sampling = Sampling(max_tokens=TOKENS, temperature=0.0, stop_ids=tokenizer.stop_ids)
    responses = [tokenizer.decode(found.tokens) for found in engine.generate(prompts, sampling, list(range(NUM)))]
    rows = []
    for i, (question, value, response) in enumerate(zip(questions, values, responses, strict=True)):
        best = value.index(max(value))
        wrong = i % 3 == 2
        rows.append(
            {
                "question": question,
                "choices": CHOICES,
                "label": (best + wrong) % len(CHOICES),
                "wanted": response + wrong * "?",
            }
        )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        text = text.replace("DATA", str(tmp_path / "tasks/data.jsonl")).replace("TOKENS", str(TOKENS))
        (tmp_path / f"tasks/{name}.yaml").write_text(text)

    results, samples = harness(tmp_path, folder)
    found = [[float(each[0][0]) for each in row["resps"]] for row in samples["choose"]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(values), atol=1e-3, rtol=0)
    assert [row["resps"][0][0] for row in samples["write"]] == responses
    assert (results["choose"]["acc,none"], results["write"]["exact_match,none"]) == (8 / 12, 8 / 12)

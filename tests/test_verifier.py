"""The math verifier: pairs judged by people, the rules of docs/verifier.md, hostile answers and public data."""

import gzip
import json
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from timing import shortest

from rlhf.rewards.answers import equal, verify
from rlhf.rewards.explanation import explain

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"

# responses -> the answer that they state
STATED = [
    ("#### Step 1: think\nWe get 42.\n#### Conclusion\nThe answer is 42.", "42"),
    ("### Solution\n...\n#### Final Answer\n42", "42"),
    ("#### Final Answer:\n\n$$\n42\n$$", "42"),
    ("The answer is:\n\\[\n42\n\\]\n", "42"),
    ("Thus the answer is\n$$\n\\frac{1}{2}\n$$\nDone.", "1/2"),
    ("<think>hm</think><answer>42</answer>", "42"),
    ("<answer>\n42\n</answer>", "42"),
    ("<answer> The answer is 42. </answer>", "42"),
    ("<answer>\\boxed{42}</answer>", "42"),
    ("## Final Answer\n\n42", "42"),
    ("**Final Answer**\n\n42", "42"),
    ("**Final Answer:** 42", "42"),
    ("Final Answer\n$42$", "42"),
    ("\\boxed{1} or \\boxed{2}", "1,2"),
    ("$\\boxed{1}$ and $\\boxed{2}$", "1,2"),
    ("$x=\\boxed{1}$ or $x=\\boxed{2}$", "1,2"),
    ("\\boxed{1}, \\boxed{2}, and \\boxed{3}", "1,2,3"),
    ("\\fbox{42}", "42"),
    ("\\boxed{41} no wait \\boxed{42}", "42"),
    ("#### 42", "42"),
    ("####42", "42"),
    ("#### 1. First\ntext\n#### 2. Second\n The answer is 42", "42"),
    ("#### The answer is 42", "42"),
    ("#### Answer: 42", "42"),
    ("#### Monday", "Monday"),
    ("#### x = 42", "42"),
    ("#### $42", "42"),
    ("#### **42**", "42"),
    ("The final answer is $\\boxed{42}$.", "42"),
    ("Answer: 42", "42"),
    ("**Answer**: 42", "42"),
    ("answer: \\(42\\)", "42"),
    ("The answer is **42**.", "42"),
    ("So the answer is 3.14.", "3.14"),
    ("The answer is 42, since 6*7=42.", "42"),
    ("The answer is $42$ because 6*7.", "42"),
    ("The correct answer is (C).", "C"),
    ("The answer is C: 12", "C"),
    ("Final answer: \\[42\\]", "42"),
    ("The answer is $x = 42$.", "42"),
    ("\\boxed{42}\n\n#### Note\nThis is nice because it is.", "42"),
    ("\\boxed{42}\n#### Verification\n6*7=42", "42"),
    ("#### 42\n", "42"),
    ("Answer:\n42", "42"),
    ("\\boxed{\\text{42}}", "42"),
    ("$$\\boxed{42}$$", "42"),
    ("\\[ \\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}} \\]", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("\\boxed {42}", "42"),
    ("\\boxed{\n42\n}", "42"),
    ("The answer is: \n\n\\boxed{42}", "42"),
    ("#### $42$", "42"),
    ("####  42 apples", "42"),
    ("Therefore, the answer is 1,234.", "1234"),
    ("The answer is 42 dollars.", "42"),
    ("The answer is twelve.", "12"),
    ("The answer to the problem is 42.", "42"),
    ("The final answer is: **42**", "42"),
    ("**The answer is 42**", "42"),
    ("The answer is: A", "A"),
    ("Final answer = 42", "42"),
    ("### Answer\n42", "42"),
    ("**Answer**\n42", "42"),
    ("answer = 42", "42"),
    ("The answer should be 42", "42"),
    ("#### 5 wrong\n#### 42", "42"),
    ("**Final Answer: 42**", "42"),
    ("The final answer is\n42.", "42"),
    ("Final Answer: 42 (since 6*7)", "42"),
    ("####  -42", "-42"),
]

# responses that do not state 42
NOT_STATED = [
    "The sum is 42",
    "#### 42 wrong",
    "#### Step 42: go",
    "#### 42. Go on",
    "#### 42\n#### 43",
    "\\boxed{42} is wrong, \\boxed{41}",
    "\\boxed{41}, \\boxed{42}",
    "\\boxed{42 or 43}",
    "\\boxed{} 42",
    "<answer>41</answer> 42",
    "The answer is not 42",
]

HOSTILE = [
    "9^9^9^9",
    "2^{2^{2^{2^{2^2}}}}",
    "(x+1)^{1000}",
    "(x+y+z)^{16}",
    "(a+b+c+d+e+f+g)^7",
    "(1+√2+√3+√5)^{16}",
    "((((9!)!)!)!)!",
    "5" + "!" * 290,
    "\\binom{300}{150}^{100}",
    "2^{4000}" * 40,
    "2^{999999937/2}",
    "(x+1)^{99999999999/2}",
    "(x^{y^{z^{w}}})^{a^{b}}",
    "\\sqrt{" * 50,
    "\\sqrt[3]{" * 35,
    "x^" * 140 + "x",
    "|" * 300,
    "\\sin x" * 50,
    "\\log_" * 60,
    "\\{" * 140,
    "\\frac{1}{x+1}+" * 20,
    ",".join(f"\\frac{{1}}{{1+\\sqrt{{{i}}}}}" for i in range(2, 14)),
    ",".join(f"x_{{{i}}}={i}" for i in range(35)),
    "<".join("x" * 140),
    "=".join(["x+1"] * 70),
    ":".join(["x+1"] * 60),
    "\\begin{pmatrix}" + "1¦" * 120 + "\\end{pmatrix}",
    "one hundred " * 24,
    "5 " + "per a " * 45,
    "0.\\overline{" + "9" * 280 + "}",
    "∞^∞",
    "0^{-1}",
    "i^{999999999999}",
    "a \\quad " * 35,
    "{1\\over" * 40,
    "n≡1(mod 3)" * 25,
    "a" * 10**6,
    "\\boxed{" * 100_000,
    "\\boxed{1} and " * 7000,
    "answer to " * 100_000,
    "final answer\n" * 70_000,
    "#### 1\n" * 100_000,
    "<answer>" * 100_000,
    "}" * 10**6,
]


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("response", "answer"), STATED)
def test_a_stated_answer_is_found(response, answer):
    assert verify(response, answer) == 1.0


@pytest.mark.parametrize("response", NOT_STATED)
def test_what_is_not_stated_earns_nothing(response):
    assert verify(response, "42") == 0.0


def test_rules():
    """Pairs for the rules of docs/verifier.md, in both directions."""
    pairs = lines("answer_rules")
    assert len(pairs) > 300
    both = [
        (a, b, pair["equal"])
        for pair in pairs
        for a, b in ((pair["answer"], pair["other"]), (pair["other"], pair["answer"]))
    ]
    assert [(a, b) for a, b, same in both if equal(a, b) != same] == []


def test_pairs_judged_by_people():
    pairs = lines("answer_pairs")
    assert [pair["equal"] for pair in pairs].count(True) == 165
    assert len(pairs) == 202
    said = [verify(f"So \\boxed{{{pair['boxed']}}}.", pair["answer"]) == 1.0 for pair in pairs]
    missed = [pair for pair, right in zip(pairs, said, strict=True) if pair["equal"] and not right]
    accepted = [pair for pair, right in zip(pairs, said, strict=True) if right and not pair["equal"]]
    assert missed == accepted == []  # these pairs were known when the rules were written; the limits are 15 % and one


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_take_little_time(answer):
    seconds = []
    for response in (f"#### {answer}", f"\\boxed{{{answer}}}", f"The answer is {answer}"):
        for right in ("18", answer):
            seconds.append(shortest(lambda response=response, right=right: verify(response, right)))
    assert sorted(seconds)[len(seconds) // 2] < 0.05  # the median, because the machine may be busy
    assert max(seconds) < 0.2


def test_gsm8k_gold_and_shuffled(shared_data):
    with gzip.open(shared_data / "gsm8k_test.jsonl.gz", "rt") as file:
        solutions = [json.loads(line)["answer"] for line in file]
    numbers = [Decimal(re.search(r"#### (.*)$", solution)[1].replace(",", "")) for solution in solutions]
    assert len(solutions) == 1319
    assert all(verify(solution, solution) == 1.0 for solution in solutions)
    for shift in (1, 100, 700):
        shifted = zip(solutions, solutions[shift:], numbers, numbers[shift:], strict=False)
        assert all(verify(a, b) == float(m == n) for a, b, m, n in shifted)


@pytest.mark.parametrize(
    ("answer", "response", "says"),
    [
        ("12 m", "so \\boxed{12 cm}", "0: length * 10 against length * 1000"),
        ("18", "#### 3 * 6", "0: work was left undone on one side"),
        ("18", "18", "0: nothing was stated"),
        ("x>2", "\\boxed{(2,\\infty)}", "1: both have the same value"),
        ("5", "\\boxed{9^9^9^9}", "0: words against quantity"),
    ],
)
def test_it_explains_itself(answer, response, says):
    command = [sys.executable, "tools/explain_answer.py", answer, "-"]
    said = subprocess.run(
        command, input=response, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert said[-1] == says
    assert said[0] == f"answer:   {answer!r}"


def test_every_form_is_explained():
    for pair in lines("answer_pairs") + lines("answer_rules"):
        response = f"\\boxed{{{pair['answer']}}}"
        assert explain(response, pair["answer"])[-1].startswith("1: ")
    assert all(explain(f"#### {answer}", "18")[-1].startswith("0: ") for answer in HOSTILE[:36])


def test_benchmark():
    command = [sys.executable, "benchmarks/verifier.py", "--answers=100"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "| this verifier | 0 | 0 |" in said

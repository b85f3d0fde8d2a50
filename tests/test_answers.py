"""The verifier of mathematical answers: which part of a response is its answer, and which answers are equal."""

import gzip
import json
import re
from decimal import Decimal

import pytest
from timing import shortest

from rlhf.rewards.answers import equal, extract, verify

EXTRACTED = [
    ("16 - 7 = <<16-7=9>>9\n#### 18", "18"),
    ("#### 5\nno, rather\n#### 18 dollars\nNext question: 3", "18 dollars"),
    ("####\n18", "18"),
    ("#### \n", None),
    (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{1}, that is \boxed{\left\{1, 2\right\}} holds", r"\left\{1, 2\right\}"),
    (r"$\boxed 5$.", "5"),
    (r"\boxed{12", None),  # cut off
    (r"\boxed{ }", None),
    ("#### Step 2: add\n\\boxed{7}", "7"),  # a Markdown heading
    (r"\boxed{7} means that" + "\n#### 8", "8"),
    (r"#### \boxed{9}", "9"),
    ("The answer is 18.", "18"),
    ("The Answer is: $3.50. I hope it is correct.", "$3.50"),
    ("First answer: 3\n**Answer:** 4", "4"),
    ("The answer is\n\n4", "4"),
    ("Final Answer: The final answer is $x = 5$. I hope it is correct.", "$x = 5$"),
    ("She makes 18", None),  # a number that is not stated as the answer
    ("I have no answer", None),
    ("", None),
]

EQUAL = [
    # numbers
    ("18", "18.00"),
    ("18", " 18. "),
    ("18", "+18"),
    ("18", "**18**"),
    ("-5", "−5"),
    ("-5", "- 5"),
    ("0", "-0.0"),
    (".5", "0.50"),
    ("1,234", "1234"),
    ("1,234,567.5", "1234567.50"),
    (r"10{,}000", "10000"),
    (r"10,\!000", "10000"),
    (r"10\,000", "10000"),
    ("3e2", "300"),
    (r"3 \times 10^{8}", "300,000,000"),
    (r"1.5 \cdot 10^{-3}", "0.0015"),
    # fractions
    ("1/2", "0.5"),
    ("6/8", "3/4"),
    (r"\frac{1}{2}", "1/2"),
    (r"\dfrac12", r"\tfrac{2}{4}"),
    (r"\frac1{2}", r"\frac{1}2"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{1,000}{3}", "1000/3"),
    ("1 1/2", "1.5"),
    ("-2 3/4", "-11/4"),
    (r"1\frac{1}{2}", "3/2"),
    (r"3 \frac12", "3.5"),
    # units, currencies, percent
    ("$18", "18 dollars"),
    (r"\$18", "18"),
    ("-$5", "$-5"),
    ("€1,200.50", "1200.5"),
    ("5¢", "5 cents"),
    ("5 km", "5"),
    ("5km", "5 kilometers"),
    ("5 m", "5"),
    (r"5\text{ cm}^2", "5"),
    (r"5 \mathrm{cm}^{2}", "5 square centimeters"),
    ("60 km/h", "60 kilometers per hour"),
    (r"9.8 m/s^2", "9.8"),
    ("1 1/2 cups", "1.5"),
    ("18 eggs.", "18"),
    ("50%", "50"),
    (r"50\%", "50 percent"),
    (r"90^\circ", "90 degrees"),
    (r"90^{\circ}", "90°"),
    ("20°C", "20"),
    # roots
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\sqrt2", "√2"),
    (r"\sqrt{9}", "3"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"\sqrt{\frac{1}{2}}", r"\sqrt2/2"),
    (r"\sqrt{2}\sqrt{3}", r"\sqrt{6}"),
    (r"1+\sqrt{5}", r"\sqrt{5} + 1"),
    (r"\frac{1+\sqrt{5}}{2}", r"\frac12 + \frac{\sqrt5}{2}"),
    (r"2(1-\sqrt{3})", r"2-2\sqrt{3}"),
    (r"2\frac{\sqrt{3}}{4}", r"\sqrt{3}/2"),
    ("sqrt(12)", "2*sqrt(3)"),
    (r"\sqrt[3]{8}", "2"),
    (r"\sqrt[3]{-\frac{27}{8}}", "-1.5"),
    # pi
    (r"2\pi", "2π"),
    ("2pi", r"\frac{4\pi}{2}"),
    (r"\frac{3\pi}{4}", r"\frac34 \pi"),
    (r"\frac{\pi}{\sqrt{2}}", r"\frac{\sqrt2}{2}\pi"),
    (r"4 + 2\pi \text{ square inches}", "2π+4"),
    # more of units, currencies and fractions
    ("USD 5", "US$5"),
    ("Rs. 20", "20"),
    ("18 dollars a day", "$18"),
    ("3 bags of rice", "3"),
    ("5 cm²", "5 sq cm"),
    ("2½", "2.5"),
    ("¾", "0.75"),
    # several values
    (r"\pm 2", "2, -2"),
    (r"x = 1 \pm \sqrt{2}", r"\{1-\sqrt2, 1+\sqrt2\}"),
    (r"\{\pm1, 0\}", "-1, 0, 1"),
    (r"x=1 \text{ or } x=2", "1, 2"),
    ("x = 1, y = 2", "1,2"),
    ("(x, y) = (1, 2)", "(1,2)"),
    (r"\emptyset", r"\{ \}"),
    ("(1, 2)", r"\left( 1, \frac{4}{2} \right)"),
    ("[0.5, 1)", "[1/2,1)"),
    (r"(-\infty, 2]", "(-∞,2]"),
    (r"(-\infty,1) \cup [2,3)", r"[2,3)\cup(-\infty,1)"),
    ("{1,2,3}", "{3, 2, 1}"),
    (r"\{1, \frac12\}", "{0.5, 1}"),
    ("1, 2", "2,1"),
    ("1 and 2", "2 or 1"),
    (r"-1 \text{ and } 1", "1, -1"),
    ("((1,2),3)", "((1.0,2),3)"),
    # text
    ("x = 5", "5"),
    (r"x \in [1,2]", "[1,2]"),
    ("Monday", r"\text{monday}"),
    ("(C)", "C"),
    ("$2x + 3$", "2x+3"),
    (r"x^{2}", "x^2"),
    (r"\frac{x}{3}", "x/3"),
    (r"\log_{2}3", r"\log_2 3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\(18\)", "[18]"),
]

UNEQUAL = [
    ("18", "19"),
    ("18", "-18"),
    ("18", "1800"),
    ("18", "0.18"),
    ("1800", "18.00"),
    ("50%", "0.5"),
    ("$18.50", "1850"),
    ("0.33", "1/3"),
    ("0.3333333333333333", "1/3"),
    ("1,23", "123"),
    ("1 234", "1234"),  # two numbers
    ("1 1/2", "11/2"),
    ("1/2/3", "1/6"),
    ("1/0", "0"),
    ("18 19", "18"),
    ("2 million", "2"),
    ("3 halves", "3"),
    ("5 dozen", "5"),
    ("5k", "5"),
    ("2x", "2"),
    ("2 xy", "2"),
    ("5^2", "5"),
    ("5 squared", "5"),
    ("3 pm", "3 am"),
    ("16 - 3 - 4", "9"),  # the calculation is not carried out
    ("3 * 6", "18"),
    ("(3)(6)", "18"),
    (r"\sqrt{2}", "1.41421356"),
    (r"\sqrt[3]{8}", "-2"),
    (r"\sqrt[3]{9}", "2"),
    (r"\sqrt[4]{-16}", "2"),
    (r"\sqrt{-4}", "2"),
    (r"2\pi", "2"),
    (r"2\pi", "6.28"),
    (r"\pi^2", r"2\pi"),
    (r"\pm 2", "2"),
    ("x = 1, y = 2", "1"),
    ("(1, 2)", "(2, 1)"),
    ("(1, 2)", "[1, 2]"),
    ("(1, 2)", "{1, 2}"),
    ("{1, 2}", "{1, 2, 3}"),
    ("(1,234)", "1234"),
    ("", ""),
    ("$", "€"),
    ("18 or so, maybe 19", "18"),
    ("not 5", "5"),
    ("Yes", "No"),
    ("nan", "1"),
    ("inf", "1e99"),
]

HOSTILE = [
    "9**9**9",
    "9^9^9^9",
    "1e999999999",
    "1e99999999999999999999",
    "1e99" * 70,
    "10^{99}" * 40,
    "9" * 100_000,
    "0." + "9" * 290,
    "(" * 290,
    "(" * 150 + "1" + ")" * 150,
    "\\frac" * 60,
    "\\frac{1}{" * 30,
    "√" * 300,
    "√99999989" * 33,
    "√(999983/2)" * 27,
    "√[9]" * 75,
    "√[3](999983)" * 25,
    "π" * 300,
    "±" * 300,
    "±1," * 100,
    "(±1" * 99,
    "(x,y)=" * 50,
    "\\frac{π}{" * 30,
    "\\sqrt{99999989}+" * 18,
    "(1+√2)(1+√3)(1+√5)(1+√7)(1+√11)(1+√13)(1+√17)(1+√19)(1+√23)(1+√29)",
    "5" + " km" * 99,
    "5 " + "a" * 295,
    "5 " + "a " * 145 + "!",
    "5" + "km/" * 99 + "!",
    "1," * 149,
    "1,111" * 60,
    "{" + "1," * 140 + "}",
    "\\text{" * 49,
    " " * 299,
    " " * 150 + "*" * 140,
    "__import__('os').system('exit')",
    "\x00\ud800\U0001f600",
    "9" * 5_000_000,
    "1e" + "9" * 1_000_000,
    "{" * 1_000_000,
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_extract(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal(a, b):
    assert equal(a, b)
    assert equal(b, a)


@pytest.mark.parametrize(("a", "b"), UNEQUAL)
def test_unequal(a, b):
    assert not equal(a, b)
    assert not equal(b, a)


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_time_is_bounded(answer):
    def check():
        assert verify(f"#### {answer}", "18") == 0.0
        assert verify("\\boxed{" + answer, "18") == 0.0
        assert verify("answer: " * 1000 + answer, answer) in (0.0, 1.0)

    assert shortest(check) < 0.2, "a few milliseconds, and some for a slow machine"


@pytest.mark.parametrize("text", ["\\boxed{", "#", "answer ", "answer" + "*" * 999, "{", "answer is ", "####\n"])
def test_time_is_bounded_for_any_response(text):
    """Only the end of a response of megabytes is read."""
    long = text * (5_000_000 // len(text))

    def check():
        assert verify(long, "18") == 0.0
        assert verify("#### 18" + long, "18") == 0.0

    assert shortest(check) < 0.3


def test_verify_takes_bare_answers_and_solutions():
    assert verify("... #### 18", "18") == 1.0
    assert verify(r"... \boxed{\frac{3}{6}}", r"\frac{1}{2}") == 1.0
    assert verify("The answer is $18.", "She makes 9 * 2 = 18.\n#### 18") == 1.0
    assert verify("She makes 18", "18") == 0.0
    assert verify("#### 18", "She makes 9 * 2 = 18.\n#### 19") == 0.0
    assert verify("####", "18") == 0.0


@pytest.mark.parametrize(("name", "count"), [("gsm8k_test", 1319), ("gsm8k_train_2000", 2000)])
def test_gsm8k(shared_data, name, count):
    with gzip.open(shared_data / f"{name}.jsonl.gz", "rt") as lines:
        solutions = [json.loads(line)["answer"] for line in lines]
    assert len(solutions) == count
    numbers = [Decimal(re.search(r"#### (.*)$", solution)[1].replace(",", "")) for solution in solutions]
    for solution, number in zip(solutions, numbers, strict=True):
        assert (
            verify(solution, solution)
            == verify(f"The answer is ${number}.", solution)
            == verify(solution, str(number))
            == 1.0
        )
    for distance in (1, count // 2):  # the solution of another question is right only if it gives the same number
        for i in range(count):
            j = (i + distance) % count
            assert verify(solutions[i], solutions[j]) == float(numbers[i] == numbers[j])
    for solution, number in zip(solutions, numbers, strict=True):
        assert (
            verify(f"#### {number * 100}", solution) == verify(f"#### {number / 100}", solution) == float(number == 0)
        )

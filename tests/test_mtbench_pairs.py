"""Comparing the answers of two models to the questions of MT-Bench, against a real HTTP server."""

import pytest
from endpoint import Endpoint, fault
from judgments import ASKED, config, lines, of, rows

from rlhf.errors import JudgingError
from rlhf.mtbench import judged, tables


def compare(body: dict) -> str:
    """Prefer the answer of "good", and A where both are of one kind. It names no winner once."""
    text = body["messages"][-1]["content"]
    if "Shorter" in text and text.index("good") < text.index("bad"):
        return "I cannot say."
    first, second = (text.index(name) for name in ("good", "bad"))
    return "[[A]]" if "3+3" in text or first < second else "[[B]]"


def test_pairs(tmp_path):
    """A win needs both orders. The prompts of the second turn of MATH are answered with A always, so it is a tie."""
    with Endpoint(compare) as endpoint:
        given = config(endpoint, tmp_path, pairwise=True)
        table = judged(given, ASKED, of("good", "bad"))
        assert len(endpoint.asked) == 10
        found = {(line["question_id"], line["turn"]): line for line in lines(tmp_path, "judge_pair")}
        assert len(lines(tmp_path, "judge_pair")) == 5, "without the halves that came first"
        keys = ["question_id", "model_1", "model_2", "judge", "system_prompt"]
        keys += [f"{game}_{key}" for game in ("g1", "g2") for key in ("user_prompt", "judgment", "winner")]
        assert list(found[81, 1]) == [*keys, "turn", "tstamp"]
        assert {(line["model_1"], line["model_2"]) for line in found.values()} == {("bad", "good")}
        winners = {key: (line["g1_winner"], line["g2_winner"]) for key, line in found.items()}
        assert winners == {
            (81, 1): ("model_2", "model_2"),
            (81, 2): ("model_2", "error"),
            (101, 1): ("model_2", "model_2"),
            (101, 2): ("model_1", "model_2"),
            ("x", 1): ("model_2", "model_2"),
        }
        assert [found[101, 2][f"{game}_judgment"] for game in ("g1", "g2")] == ["[[A]]"] * 2
        cells = rows(table)
        assert cells[""] == ["win rate", "wins", "ties", "losses", "errors"]
        assert cells["writing"] == ["100.0 %", "1", "0", "0", "1"]
        assert cells["math"] == ["75.0 %", "1", "1", "0", "0"]
        assert cells["all"] == ["87.5 %", "3", "1", "0", "1"]
        assert "good against bad:" in table
        assert "interval is 75.0 % to 100.0 %" in table
        assert "Cut answers: good ?, bad ?." in table

        other = judged(given, ASKED, of("bad", "good"))
        assert len(endpoint.asked) == 10, "the other order of the models is the same comparison"
        assert rows(other)["all"] == ["12.5 %", "0", "1", "3", "1"]

        endpoint.answer = lambda body: "[[C]]"
        three = judged(given, ASKED, of("good", "third", "bad"))
        assert [line for line in three.splitlines() if " against " in line] == [
            "good against third:",
            "good against bad:",
            "third against bad:",
        ]
        assert rows(three)["all"] == ["50.0 %", "0", "5", "0", "0"], "of the last pair"
        assert len(endpoint.asked) == 30


def test_models_with_the_names_of_results(tmp_path):
    def prefer(body: dict) -> str:
        text = body["messages"][-1]["content"]
        return "[[A]]" if text.index("tie on") < text.index("error on") else "[[B]]"

    with Endpoint(prefer) as endpoint:
        for models, rate in ((("tie", "error"), ["100.0 %", "5", "0", "0", "0"]), (("error", "tie"), ["0.0 %", "0"])):
            table = judged(config(endpoint, tmp_path, pairwise=True), ASKED, of(*models))
            assert rows(table)["all"][: len(rate)] == rate


def test_half_a_pair_is_kept(tmp_path):
    """One of the two requests fails. FastChat leaves a line with the winner "error" out."""

    def half(body: dict) -> object:
        return compare(body) if len(endpoint.asked) % 2 else fault(500, "no")

    with Endpoint(half) as endpoint:
        given = config(endpoint, tmp_path, pairwise=True, concurrency=1)
        with pytest.raises(JudgingError, match=r"5 of 10 requests have a reply, in .*, and 5 have none"):
            judged(given, ASKED, of("good", "bad"))
        halves = lines(tmp_path, "judge_pair")
        assert [(line["g2_winner"], line["g2_judgment"]) for line in halves] == [("error", None)] * 5
        endpoint.answer = compare
        table = judged(given, ASKED, of("good", "bad"))
        assert len(endpoint.asked) == 15
        assert judged(given, ASKED, of("good", "bad")) == table
        assert len(endpoint.asked) == 15
    assert rows(table)["all"] == ["87.5 %", "3", "1", "0", "1"]
    assert [line["g2_judgment"] is None for line in lines(tmp_path, "judge_pair")] == [False] * 5


def test_the_interval_of_a_win_rate():
    """It is that of a binomial proportion, and equal turns of one question do not make it narrower."""
    low, high = tables.interval([[1.0]] * 60 + [[0.0]] * 40)
    assert (low, high) == pytest.approx((0.6 - 1.96 * 0.049, 0.6 + 1.96 * 0.049), abs=0.011)
    assert tables.interval([[1.0, 1.0]] * 60 + [[0.0, 0.0]] * 40) == (low, high)
    apart = tables.interval([[1.0], [1.0]] * 60 + [[0.0], [0.0]] * 40)
    assert apart[1] - apart[0] == pytest.approx((high - low) / 2**0.5, abs=0.015)
    assert tables.interval([[], [1.0]]) == (1.0, 1.0)
    assert tables.interval([[]]) == (0.0, 1.0)

"""Judges of MT-Bench that fail, and a full disk, against a real HTTP server."""

import resource
from dataclasses import replace

import pytest
from endpoint import CLOSE, Endpoint, completion, fault
from judgments import ASKED, ONCE, config, lines, of, rows

from rlhf.errors import JudgingError, StorageError, UserError
from rlhf.mtbench import grading, judged


def test_failed_requests_are_sent_by_the_next_call(tmp_path, capsys):
    def answer(body: dict) -> object:
        if "2+{2}" in body["messages"][-1]["content"]:
            return fault(500, "out of memory")
        return (CLOSE,) if "Shorter" in body["messages"][-1]["content"] else "[[7]]"

    with Endpoint(answer) as endpoint:
        given = config(endpoint, tmp_path, concurrency=1)
        with pytest.raises(JudgingError) as error:
            judged(given, ASKED, of("a"))
        file = tmp_path / "model_judgment" / "judge_single.jsonl"
        assert str(error.value).startswith(f"2 of 5 requests have a reply, in {file}, and 3 have none: judge.url=")
        assert str(error.value).endswith("out of memory (1 tries); start again: only those are sent")
        assert error.value.code == 1
        assert len(lines(tmp_path)) == 2
        assert not file.with_suffix(".md").exists()
        endpoint.answer, known = (lambda body: "[[9]]"), len(endpoint.asked)
        assert rows(judged(given, ASKED, of("a")))["mean"] == [f"{(7 * 2 + 9 * 3) / 5:.2f}"]
        assert len(endpoint.asked) == known + 3


def test_refused_requests_are_counted_in_the_table(tmp_path, capsys):
    """They have no reply, and the next call sends them again."""

    def answer(body: dict) -> object:
        return fault(400, "content filter") if "2+{2}" in body["messages"][-1]["content"] else "[[7]]"

    with Endpoint(answer) as endpoint:
        for number in (1, 2):
            table = rows(judged(config(endpoint, tmp_path), ASKED, of("a")))
            assert (table["mean"], table["math"], table["without rating"]) == (["7.00"], ["-"], ["2"])
            assert len(endpoint.asked) == 3 + 2 * number
            assert "3 of 5 requests have a reply" in (said := capsys.readouterr().out)
            assert "the endpoint refuses them; the table counts them as failed: judge.url=" in said
        asked = [replace(ONCE, id=number) for number in range(20)]
        endpoint.answer = lambda body: fault(400, "content filter")
        with pytest.raises(JudgingError, match=r"20 have none: judge\.url=.*: status 400: content filter$"):
            judged(config(endpoint, tmp_path / "new"), asked, of("a", asked=asked))


def test_replies_that_are_cut_before_the_rating(tmp_path, capsys):
    """Such a judge is asked no more after a few replies. Some of them are only a message."""
    asked = [replace(ONCE, id=number) for number in range(20)]
    with Endpoint(lambda body: completion("Let me think", finish="length")) as endpoint:
        given = config(endpoint, tmp_path, concurrency=1, max_tokens=9)
        with pytest.raises(JudgingError, match=r"the last 8 replies were cut at judge.max_tokens=9: raise it, and set"):
            judged(given, asked, of("a", asked=asked))
        assert len(endpoint.asked) == grading.FAILURES
        endpoint.answer = lambda body: completion("[[7]]" if len(endpoint.asked) % 2 else "Let me", finish="length")
        assert rows(judged(given, asked, of("a", asked=asked)))["without rating"] == ["14"]
        assert "6 replies without a result were cut at judge.max_tokens=9: raise it" in capsys.readouterr().out


def test_a_judge_that_is_out_of_order_gets_few_requests(tmp_path):
    asked = [replace(ONCE, id=number) for number in range(100)]
    with Endpoint(lambda body: fault(429, "slow down")) as endpoint:
        with pytest.raises(JudgingError, match="0 of 100 requests have a reply"):
            judged(config(endpoint, tmp_path, concurrency=4), asked, of("a", asked=asked))
        assert grading.FAILURES <= len(endpoint.asked) < grading.FAILURES + 4


def test_a_full_disk_ends_the_call_with_one_line(tmp_path):
    """The limit of the size of files is a full disk to the program. A reply that is cut off is asked again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Endpoint() as endpoint:
        given = config(endpoint, tmp_path, concurrency=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
        try:
            with pytest.raises(
                StorageError, match=r"judge_single\.jsonl: File too large; fix this and start again"
            ) as error:
                judged(given, ASKED, of("a"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert error.value.code == 1
        assert 1 < len(endpoint.asked) < 5
        judged(given, ASKED, of("a"))
        assert len(endpoint.asked) == 5 + 1
        page = tmp_path / "model_judgment" / "judge_single.md"
        page.unlink()
        page.symlink_to("/dev/full")
        with pytest.raises(StorageError, match=r"judge_single\.md: No space left on device; fix this and start again"):
            judged(given, ASKED, of("a"))


def test_no_judge(tmp_path, monkeypatch, capsys):
    with Endpoint(models=("a", "b")) as endpoint:
        with pytest.raises((JudgingError, UserError), match=r"set judge\.model to one of a, b"):
            judged(config(endpoint, tmp_path), ASKED, of("a"))
        key = "sk-very-secret"
        monkeypatch.setenv("OPENAI_API_KEY", key)
        endpoint.key = "sk-another"
        with pytest.raises(JudgingError) as error:
            judged(config(endpoint, tmp_path, model="a"), ASKED, of("a"))
        given = config(endpoint, tmp_path, model="a")
    assert "refuses the API key in $OPENAI_API_KEY" in str(error.value)
    with pytest.raises(JudgingError) as closed:
        judged(given, ASKED, of("a"))
    told = capsys.readouterr()
    files = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    for text in (str(error.value), str(closed.value), told.out, told.err, files):
        assert key not in text

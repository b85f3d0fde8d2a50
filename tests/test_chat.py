"""Chat templates are programs of a model's folder: they run with limits, and cannot access anything else."""

from __future__ import annotations

import resource
import signal
import time

import pytest
from vocabularies import write_byte_level

from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it takes more than 0.5 s"),
        (
            "{% set n = namespace(x='x') %}{% for a in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "it takes more than 64 MB",
        ),
        ("{{ 'x' * 9999999999 }}", "it takes more than 64 MB"),
        ("{{ 'x'|center(9999999999) }}", "it takes more than 64 MB"),
        ("{{ '%9999999999d' % 1 }}", "it takes more than 64 MB"),
        ("{{ 10 ** 1000000000 }}", "a number has more than 4096 bits"),
        (
            "{% set n = namespace(x=10) %}{% for a in range(50) %}{% set n.x = n.x * n.x %}{% endfor %}",
            "a number has more than 4096 bits",
        ),
    ],
)
def test_chat_template_is_bounded(tmp_path, monkeypatch, template, said):
    """Time, memory and numbers are limited. The limits of the process are restored afterwards."""
    monkeypatch.setattr("rlhf.data.chat.MEMORY", 64 << 20)
    if said.endswith(" s"):
        monkeypatch.setattr("rlhf.data.chat.SECONDS", 0.5)
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)
    folder = write_byte_level(tmp_path, template=template)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"chat template fails: {said}; change"):
        Tokenizer.load(folder).render(MESSAGES, True)
    assert time.monotonic() - start < 8
    assert (resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)) == before


def test_chat_template_cannot_reach_the_machine(tmp_path):
    folder = write_byte_level(tmp_path, template="{{ messages.__class__.__base__.__subclasses__() }}")
    with pytest.raises(UserError, match="chat template fails"):
        Tokenizer.load(folder).chat(MESSAGES, True)

"""The configuration is read from files and key=value, and written back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.config import Config
from rlhf.errors import UserError

EVERY_CONTROL = "".join(map(chr, range(1, 32))) + "\x7f\x85\u2028"
ODD = [
    "a\\b",
    "\n\nHuman:",
    '"',
    "'",
    "\r\n",
    "\t",
    EVERY_CONTROL,
    "\\n",
    "\\u0041",
    '"""',
    "# no comment",
    " ",
    "é€😀",
    "[a]",
    "true",
    "1",
]


def there_and_back(config: Config, folder: Path) -> Config:
    """Write the configuration to a file as a run does, and read it as a user would."""
    (folder / "config.toml").write_text(configuration.to_toml(config))
    return configuration.load(config.mode, [str(folder / "config.toml")])


@pytest.mark.parametrize("mode", ALGORITHMS)
def test_defaults_there_and_back(tmp_path: Path, mode: str) -> None:
    assert there_and_back(configuration.load(mode, []), tmp_path) == configuration.load(mode, [])


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_texts_there_and_back(tmp_path: Path, text: str) -> None:
    """Stop strings and folder names may have lines, quotes, backslashes and all control characters except NUL."""
    config = configuration.load("grpo", [])
    config = replace(config, out=text, rollout=replace(config.rollout, stop=(text, "x" + text)))
    assert there_and_back(config, tmp_path) == config


def test_escapes_of_the_command_line(tmp_path: Path) -> None:
    """A list of strings has TOML syntax on the command line, too."""
    config = configuration.load("grpo", [r'rollout.stop=["\n\nHuman:", "a\\b"]', r"out=a\b"])
    assert config.rollout.stop == ("\n\nHuman:", r"a\b")
    assert config.out == r"a\b"
    assert there_and_back(config, tmp_path) == config


def test_every_key_there_and_back(tmp_path: Path) -> None:
    """All keys are tested with values that are not the defaults: other numbers, and inverted booleans."""
    config = configuration.load("grpo", [])
    overrides = []
    top = {f.name: getattr(config, f.name) for f in fields(Config) if f.name != "sections"}
    for section, value in {**top, **config.sections}.items():
        named = [(f"{section}.{f.name}", getattr(value, f.name)) for f in fields(value)] if is_dataclass(value) else []
        named = [(key, old) for key, old in named if key != "rollout.inflight"]
        overrides += [
            f"{key}={str(other(old)).lower()}" for key, old in [*named, (section, value)] if other(old) is not None
        ]
    made = configuration.load(
        "grpo", [*overrides, "rollout.inflight=1.25"]
    )  # the one number that is at least 1, while others are at most 1
    assert len(overrides) > 60
    assert there_and_back(made, tmp_path) == made
    assert made != config


def other(value: Any) -> Any:
    """Return another value of the same type that every key accepts. None: the value is no number and no boolean."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value / 2 + 0.0625 if isinstance(value, float) else None


def test_later_ones_win_key_by_key(tmp_path: Path) -> None:
    """A section in one file does not reset keys of the same section in another file."""
    (tmp_path / "one.toml").write_text("steps = 7\n[optim]\nlr = 0.5\nclip = 2\n")
    (tmp_path / "two.toml").write_text("[optim]\nlr = 0.25\n")
    files = [str(tmp_path / name) for name in ("one.toml", "two.toml")]
    config = configuration.load("sft", [*files, "optim.beta1=0.5", "optim.beta1=0.75"])
    assert (config.steps, config.optim.lr, config.optim.clip, config.optim.beta1) == (7, 0.25, 2.0, 0.75)
    assert configuration.load("sft", files[::-1]).optim.lr == 0.5
    assert configuration.load("sft", ["optim.lr=1", *files]).optim.lr == 0.25


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("steps=true", "steps must be int, got True"),
        ("steps=1.0", "steps must be int, got 1.0"),
        ("optim.lr=true", "optim.lr must be float, got True"),
        ("parallel.zero=1", "parallel.zero must be bool, got 1"),
        ("rollout.stop=[1]", "rollout.stop must be a list of strings"),
        ("data.train=['a', 'a']", "data.train must be a list of different strings that are not empty"),
        ("checkpoint.format=[]", "checkpoint.format must be a list of 1 or more different strings"),
        ("optimm.lr=1", "unknown key 'optimm': did you mean 'optim'?"),
        ("optim.l.r=1", "optim.lr"),
        ("optim=1", "optim is a section, got 1: set one of its keys, such as optim.lr"),
        ("steps.many=1", "steps must be int"),
        ("reward.weights=1", "reward.weights is a table of numbers, got 1: set reward.weights.NAME=1"),
        ("reward.weights.\udcff=1", "reward.weights must be text in UTF-8"),
        ("reward.weights.a=x", "reward.weights.a must be float, got 'x'"),
        ("reward.weights.a=nan", "reward.weights.a must be at least -1000000.0 and at most 1000000.0, got nan"),
        ("data.train=[a.jsonl,b=b.jsonl]", """is not TOML: write 'data.train=["A", "B"]', with both kinds of quotes"""),
        ("checkpoint.format=[hf,mcore]", """write 'checkpoint.format=["A", "B"]'"""),
        ("log.to=[wandb]", """write 'log.to=["A", "B"]'"""),
        ("rollout.stop=[/INST]", """write 'rollout.stop=["A", "B"]'"""),
        ("mode=grpo", "key 'mode' cannot be set in a file"),
    ],
)
def test_what_is_no_value_of_a_key(argument: str, wanted: str) -> None:
    with pytest.raises(UserError) as error:
        configuration.load("sft", [argument])
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_of_strings_may_be_one_string() -> None:
    assert configuration.load("grpo", ["rollout.stop=Human:"]).rollout.stop == ("Human:",)
    assert configuration.load("grpo", ["rollout.stop=[INST"]).rollout.stop == ("[INST",)
    assert configuration.load("grpo", ["out=[a,b]"]).out == "[a,b]"
    assert configuration.load("grpo", ["reward.function=math", "reward.function="]).reward.function == ()
    assert configuration.load("sft", ["data.train=2024"]).data.train == ("2024",)
    assert configuration.load("sft", ['data.train=["2024", "a=b.jsonl"]']).data.train == ("2024", "a=b.jsonl")


def test_a_table_of_numbers(tmp_path: Path) -> None:
    """Its keys have any name. Each is set on its own, and files and arguments add to it."""
    (tmp_path / "one.toml").write_text('[reward.weights]\nstyle = 0.5\n"a.b" = 1\n')
    keys = ["reward.weights.style/length=-2", "reward.weights.style=1"]
    config = configuration.load("grpo", [str(tmp_path / "one.toml"), *keys])
    assert config.reward.weights == {"style": 1.0, "a.b": 1.0, "style/length": -2.0}
    assert there_and_back(config, tmp_path) == config
    assert "reward.weights={} " in configuration.manual({})

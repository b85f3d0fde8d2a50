"""The tutorial's task: a shop's clerk answers customers. A seed decides all data.

The gold reward is a formula (gold() below), which no training stage uses. The reward model learns it from scored
responses, DPO from pairs, and the other modes from the reward model. Some demonstrations name the wrong article, some
are rude, and some are too long. A quarter of them have a second turn.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Ida", "Leo", "Mia", "Ben", "Zoe", "Jan", "Amy")
THINGS = ("lamp", "chair", "clock", "phone", "radio", "kettle", "mirror", "ladder", "carpet", "basket")
QUESTIONS = {  # by category
    "stock": "{name} asks: is the {thing} still in stock?",
    "delivery": "{name} asks: when will my {thing} arrive?",
    "repair": "{name} writes: my {thing} is broken.",
    "price": "{name} wants to know what a {thing} costs.",
}
TEMPLATE = (  # chat template: one exchange has the tokens of data.template=plain
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
FOLLOW_UPS = ("And the {thing}?", "Can you say that again?")  # the second one is about the article of the first turn
POLITE = ("Thank you for asking.", "I am happy to help.", "We are sorry for the wait.", "Please call us any time.")
RUDE = ("That is not my problem.", "Read the label.", "Do not ask again.")
IDLE = ("It is cold today.", "Lunch was good.", "The shop is large.")
ABOUT = (
    "The {thing} is here now.",
    "Your {thing} comes on Monday.",
    "A new {thing} is on the way.",
    "We sell the {thing} for ten.",
)


def questions() -> list[tuple[str, str, str]]:
    """Return all prompts, each with its article and its category."""
    return [
        (form.format(name=name, thing=thing), thing, category)
        for category, form in QUESTIONS.items()
        for name in NAMES
        for thing in THINGS
    ]


def follow_up(thing: str, draw: random.Random) -> tuple[str, str]:
    """Return a random second prompt after one about `thing`, and its article."""
    form = draw.choice(FOLLOW_UPS)
    other = draw.choice(THINGS) if "{thing}" in form else thing
    return form.format(thing=other), other


def answer(thing: str, draw: random.Random) -> str:
    """Return a random response: a sentence about an article, usually the right one, and others."""
    about = thing if draw.random() < 0.6 else draw.choice(THINGS)
    moods = [draw.choice((POLITE, RUDE, IDLE, IDLE)) for _ in range(draw.randint(0, 4))]
    said = [draw.choice(ABOUT).format(thing=about)] + [draw.choice(mood) for mood in moods]
    draw.shuffle(said)
    return " ".join(said)


def worth(prompt: str, response: str) -> float:
    """Return the gold reward, between about -5 and 2.

    +1 if the response is about the last article of the prompt, -1 for each other article, +0.5 for each of up to two
    polite sentences, -1 for each rude one, and -0.25 for each sentence after the third.
    """
    sentences = [part + "." for part in response.split(".") if part.strip()]
    sentences = [sentence.strip() for sentence in sentences]
    wanted = max(THINGS, key=prompt.rfind)
    told = {
        thing
        for sentence in sentences
        for thing in THINGS
        if any(sentence == form.format(thing=thing) for form in ABOUT)
    }
    value = (1.0 if wanted in told else 0.0) - len(told - {wanted})
    value += 0.5 * min(2, len(set(sentences) & set(POLITE))) - sum(sentence in RUDE for sentence in sentences)
    return value - 0.25 * max(0, len(sentences) - 3)


def gold(prompt: str, response: str, record: dict[str, Any]) -> float:
    """Return worth(), with the signature of a reward function."""
    return worth(prompt, response)


def demonstration(prompt: str, thing: str, response: str, more: random.Random | None) -> dict[str, Any]:
    """Return a line of SFT data. more: add a second turn."""
    if not more:
        return {"query": prompt, "response": response}
    asked, other = follow_up(thing, more)
    said = [prompt, response, asked, answer(other, more)]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}


def bench(asked: list[tuple[str, str, str]], each: int = 20) -> list[dict[str, Any]]:
    """Return questions in MT-Bench's form: the first prompts of each category, with a second turn."""
    draw = random.Random(0)
    found: list[dict[str, Any]] = []
    for category in QUESTIONS:
        for prompt, thing, _ in [question for question in asked if question[2] == category][:each]:
            turns = [prompt, follow_up(thing, draw)[0]]
            found.append({"question_id": len(found) + 1, "category": category, "turns": turns})
    return found


def write(folder: Path, seed: int = 0, num: int = 8192, num_heldout: int = 128, siblings: int = 4) -> None:
    """Write the files of each stage: train_*.jsonl, and dev_*.jsonl with other prompts, some of them in mtbench.jsonl.

    Every fourth demonstration has two turns.
    """
    draw, more, asked = random.Random(seed), random.Random(seed), questions()
    draw.shuffle(asked)
    files: dict[str, list[dict[str, Any]]] = {}
    for part in ("train", "dev"):
        prompts = asked[:num_heldout] if part == "dev" else draw.choices(asked[num_heldout:], k=num)
        groups = [(prompt, thing, [answer(thing, draw) for _ in range(siblings)]) for prompt, thing, _ in prompts]
        files[f"{part}_sft"] = [
            demonstration(prompt, thing, responses[0], None if i % 4 else more)
            for i, (prompt, thing, responses) in enumerate(groups)
        ]
        files[f"{part}_reward"] = [
            {"query": p, "response": rs, "score": [worth(p, r) for r in rs]} for p, _, rs in groups
        ]
        ranked = [(prompt, sorted(responses, key=partial(worth, prompt))) for prompt, _, responses in groups]
        files[f"{part}_dpo"] = [
            {"prompt": p, "chosen": rs[-1], "rejected": rs[0]} for p, rs in ranked if worth(p, rs[-1]) > worth(p, rs[0])
        ]
        files[f"{part}_prompts"] = [{"prompt": prompt} for prompt, _, _ in groups]
    files["mtbench"] = bench(asked[:num_heldout])
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

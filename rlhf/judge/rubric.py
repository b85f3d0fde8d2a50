"""The judge as a reward function: a rubric asks it to rate a response."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf import texts
from rlhf.config import Judge
from rlhf.errors import UserError
from rlhf.judge.client import Client
from rlhf.judge.rating import rating

FIELDS = ("prompt", "response", "reference", "record")
REFERENCES = ("reference", "answer")  # keys of a record; the first one that it has is the field `reference`
SHOWN = 200  # characters of an answer without a rating that its error shows, from its end


class Rubric:
    """An async reward function that asks a judge to rate a response. The reward is the rating.

    The rubric is the file config.rubric: a Jinja template with FIELDS. `record.KEY` is a value of the record.
    """

    once = True  # an answer without a rating is paid for, and Client has tried a request several times

    def __init__(self, config: Judge):
        """Raises UserError if the rubric cannot be used."""
        import jinja2.meta
        import jinja2.sandbox

        self.config, self.path = config, config.rubric
        if not self.path:
            raise UserError("judge.rubric is not set: set it to a file with a rubric (docs/judges.md)")
        source = texts.read(Path(self.path), "set judge.rubric to a file with a rubric (docs/judges.md)")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        try:
            self._tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            remedy = "correct it ({% raw %} keeps braces as they are)"
            raise UserError(f"{self.path}:{error.lineno}: no Jinja template ({error.message}); {remedy}") from None
        used = jinja2.meta.find_undeclared_variables(self._tree)
        if unknown := used - {*FIELDS}:
            raise UserError(f"{self.path} has the field {min(unknown)}: a rubric has {', '.join(FIELDS)}")
        if "response" not in used:
            raise UserError(f"{self.path} has no {{{{ response }}}}: add it, because the judge rates the response")
        self._uses_reference = "reference" in used

    @cached_property
    def _client(self) -> Client:
        return Client(self.config)  # not before a request, because the checks of a run only read `needs`

    @cached_property
    def needs(self) -> tuple[tuple[str, ...], ...]:
        """The keys that each record must have. Of each entry, one key is enough."""
        import jinja2

        found = {
            node.attr if isinstance(node, jinja2.nodes.Getattr) else node.arg.value
            for node in self._tree.find_all((jinja2.nodes.Getattr, jinja2.nodes.Getitem))
            if isinstance(node.node, jinja2.nodes.Name) and node.node.name == "record"
            if isinstance(node, jinja2.nodes.Getattr) or isinstance(node.arg, jinja2.nodes.Const)
        }
        keys = sorted(key for key in found if isinstance(key, str) and not hasattr(dict, key))
        return (*([REFERENCES] if self._uses_reference else []), *((key,) for key in keys))

    async def __call__(self, prompt: str, response: str, record: dict[str, Any]) -> float:
        """Return the rating of a response. Raises JudgeError, and ValueError if the answer has no rating."""
        message = {"role": "user", "content": self.text(prompt, response, record)}
        reply = await self._client.ask([message])
        found = rating(reply.text)
        if found is None:
            cut = " and was cut at judge.max_tokens" if reply.cut else ""
            raise ValueError(f"the judge's answer has no rating such as [[7]]{cut}: {reply.text[-SHOWN:]!r}")
        return found

    def text(self, prompt: str, response: str, record: dict[str, Any]) -> str:
        """Return the rubric with the values of its fields. A list of references has one per line."""
        reference = next((record[key] for key in REFERENCES if record.get(key) not in (None, "", [])), None)
        if isinstance(reference, list):
            reference = "\n".join(map(str, reference))
        fields = {"prompt": prompt, "response": response, "record": record}
        return self._template.render(fields if reference is None else {**fields, "reference": reference})

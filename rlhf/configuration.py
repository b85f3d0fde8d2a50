"""Load a Config from TOML files and key=value overrides, write it as TOML, and print --help."""

import difflib
import inspect
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from rlhf import texts
from rlhf.algorithms import ALGORITHMS, SECTIONS
from rlhf.config import Between, Config
from rlhf.errors import UserError, failure
from rlhf.judge import client

REMOVED = {"log.tensorboard": "log.to=tensorboard"}  # key of an older version -> what to set instead
UNREADABLE = (ValueError, RecursionError)  # tomllib raises ValueError, also for huge numbers, and RecursionError


def load(mode: str, arguments: list[str]) -> Config:
    """Return the configuration of a run from TOML files and key=value overrides. The later of two values of a key wins.

    Raises UserError with the file or key, the value and the remedy.
    """
    tree: dict[str, Any] = {}
    for key, value in ALGORITHMS[mode].defaults.items():
        _merge(tree, _nested(key, value))
    for argument in arguments:
        if "=" in argument and not argument.startswith("-"):
            _merge(tree, _override(argument))
        else:
            _merge(tree, _read(argument))
    if "mode" in tree:
        raise UserError("key 'mode' cannot be set in a file: it is the first word of the command")
    if tree.get("out", "") == "":
        tree["out"] = f"runs/{mode}"
    config = _build(Config, tree | {"mode": mode})
    client.validate(config.judge)  # first of all, because the configuration is printed and written to files
    return config


def _read(argument: str) -> dict[str, Any]:
    if argument.startswith("-"):
        raise UserError(f"unknown option {argument!r}: give TOML files and key=value pairs, or --help")
    try:
        return tomllib.loads(texts.read(Path(argument), "give a TOML file or key=value"))
    except UNREADABLE as error:
        raise UserError(f"{argument}: not TOML ({error})") from None


def _override(argument: str) -> dict[str, Any]:
    key, text = argument.split("=", 1)
    hint: Any = Config
    for part in key.split("."):
        hint = keys(hint).get(part) if is_dataclass(hint) else None
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except UNREADABLE:
        if _is_list(hint) and text.startswith("[") and text.endswith("]"):
            remedy = f"""write '{key}=["A", "B"]', with both kinds of quotes"""
            raise UserError(f"{argument!r:.80} is not TOML: {remedy}, because the shell removes one kind") from None
        value = text  # a word without quotes is a string
    kinds = {str: (str,), tuple[str, ...]: (str, list)}
    if not isinstance(value, kinds.get(hint, (object,))):
        value = text  # a folder's name may look like a number or a date
    return _nested(key, value)


def _is_list(hint: Any) -> bool:
    """Return whether a key of this type has a list."""
    return get_origin(get_args(hint)[0] if get_origin(hint) is Annotated else hint) is tuple


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the key a.b."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(into: dict, more: dict) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def keys(cls: Any) -> dict[str, Any]:
    """Return name -> type of all keys and sections of a section. Config includes the sections of the algorithms."""
    hints = get_type_hints(cls, include_extras=True)
    if cls is Config:
        del hints["sections"]
        hints |= SECTIONS
    return hints


def _build(cls: type, tree: dict[str, Any], where: str = "") -> Any:
    known, values = keys(cls), {}
    for key, value in tree.items():
        path = f"{where}{key}"
        if path in REMOVED:
            raise UserError(f"{path} is no longer a key: remove it; to have its effect, set {REMOVED[path]}")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(
                f"unknown key {path!r}"
                + (f": did you mean {where + near[0]!r}?" if near else ": see --help for every key")
            )
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                first = fields(known[key])[0].name
                raise UserError(
                    f"{path} is a section, got {_shown(value)}: set one of its keys, such as {path}.{first}"
                )
            values[key] = _build(known[key], value, path + ".")
        else:
            values[key] = _cast(known[key], value, path)
    if cls is Config:
        values["sections"] = {name: values.pop(name, None) or section() for name, section in SECTIONS.items()}
    return cls(**values)


def _cast(hint: Any, value: Any, path: str) -> Any:
    limits = Between()
    if get_origin(hint) is Annotated:
        hint, limits = get_args(hint)
    if get_origin(hint) is tuple:
        if isinstance(value, str):
            value = [value] if value else []
        return _members(get_args(hint)[0], limits, value, path)
    if get_origin(hint) is Mapping:
        if not isinstance(value, dict):
            raise UserError(f"{path} is a table of numbers, got {_shown(value)}: set {path}.NAME=1")
        hint = Annotated[get_args(hint)[1], limits]
        return {_text(name, path): _cast(hint, number, f"{path}.{name}") for name, number in value.items()}
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{path} must be one of {', '.join(get_args(hint))}; got {_shown(value)}")
        return value
    if hint is str:
        return _text(value, path)
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise UserError(f"{path} must be {hint.__name__}, got {_shown(value)}")
    if hint in (int, float) and not limits.least <= value <= limits.most:  # false for nan, too
        raise UserError(f"{path} must be at least {limits.least} and at most {limits.most}, got {_shown(value)}")
    return hint(value)


def _members(hint: Any, limits: Between, value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(isinstance(member, str) for member in value):
        raise UserError(f"{path} must be a list of strings, got {_shown(value)}")
    if len(value) < limits.least or "" in value or len({*value}) < len(value):
        many = f"{limits.least} or more " if limits.least else ""
        raise UserError(f"{path} must be a list of {many}different strings that are not empty, got {_shown(value)}")
    return tuple(_cast(hint, member, path) for member in value)


def _text(value: Any, path: str) -> str:
    if type(value) not in (str, int, float):
        raise UserError(f"{path} must be str, got {_shown(value)}")
    text = value if isinstance(value, str) else _shown(value)
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{path} must be text in UTF-8 without NUL, got {_shown(value)}")
    return text


def _shown(value: Any) -> str:
    """Return a value as text for an error message."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python refuses to print it; a hexadecimal number in TOML can be that long
        return "a number of thousands of digits"


def notes(cls: type) -> dict[str, str]:
    """Return field name -> the comment on its line."""
    lines = [line.split("#", 1) for line in inspect.getsource(cls).splitlines() if ": " in line and "#" in line]
    return {left.split(":")[0].strip(): right.strip() for left, right in lines}


def manual(own: Mapping[str, Any], cls: Any = Config, where: str = "") -> str:
    """Return the help text: one line per key with name, default and the field's comment. own: defaults of the mode."""
    lines, said = [], notes(cls)
    defaults = {f.name: own.get(where + f.name, f.default) for f in fields(cls)}
    for name, hint in keys(cls).items():
        if is_dataclass(hint):
            lines.append(f"\n{hint.__doc__}\n{manual(own, hint, f'{where}{name}.')}")
        elif name != "mode":
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            default = {(): "[]", MISSING: "{}"}.get(defaults[name], defaults[name])
            lines.append(
                f"  {where + name + '=' + str(default):32} {said[name]}"
                + (f" ({' | '.join(choices)})" if choices else "")
            )
    return "\n".join(lines)


def save(config: Config, name: str) -> str:
    """Write the configuration to NAME.toml in its `out`. Return an error message, or "" on success."""
    file = Path(config.out) / f"{name}.toml"
    try:
        file.write_text(f"# ./launch.sh {config.mode} {file}\n{to_toml(config)}", encoding="utf-8")
    except OSError as error:
        reason = failure(error, file) or error
        return f"out={config.out} cannot be written: {reason}; set out to a folder that has free space"
    return ""


def to_toml(config: Config) -> str:
    """Return the whole configuration as TOML text. load() reads it back."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(map(text, value)) + "]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{text(name)} = {text(held)}" for name, held in value.items()) + "}"
        if isinstance(value, (int, float)):
            return repr(value)
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML escapes DEL, too

    tree = asdict(config)
    del tree["mode"]
    tree |= tree.pop("sections")
    top = [f"{k} = {text(v)}" for k, v in tree.items() if not isinstance(v, dict)]
    sections = [
        f"\n[{k}]\n" + "\n".join(f"{a} = {text(b)}" for a, b in v.items())
        for k, v in tree.items()
        if isinstance(v, dict)
    ]
    return "\n".join(top + sections).lstrip() + "\n"

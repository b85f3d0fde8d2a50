"""The rules of CONTRIBUTING.md, checked on the syntax tree of every file."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS, SECTIONS
from rlhf.config import Config
from rlhf.configuration import notes
from rlhf.contracts import Engine
from rlhf.model.families import CLASSES, FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in SOURCES if path != PACKAGE / "__init__.py"]
EVERYTHING = SOURCES + [
    path for folder in ("tests", "tools", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]

# Imports go in one direction: a part of the package imports only parts of lower layers, and none of its own layer.
LAYERS = (
    ("errors", "lazy", "phases", "config", "output", "progress"),
    ("contracts", "texts", "patches"),
    ("algorithms", "recorder", "folders", "lock", "judge", "trackers"),
    ("configuration", "parallel", "metrics", "interrupt", "report"),
    ("data", "model", "weights", "rewards", "residence", "identity"),
    ("train", "rollout", "writer", "shapes", "mtbench"),
    ("prepare", "convert", "cluster", "launcher", "variables", "watchdog", "checkpoint"),
    ("roles", "ledger", "benchmark"),
    ("estimate",),
    ("evaluate", "answering", "dryrun"),
    ("loop",),
    ("assemble",),
    ("__main__",),
)
DEPTH = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}
SIBLINGS = {  # the exceptions: part -> modules of the same layer that it may import
    "metrics": ("parallel.mesh",),
    "weights": ("model.architecture", "model.families"),
    "variables": ("cluster",),
    "data": ("model.families",),
}
ONLY_IN = {
    "vllm": {"rollout/vllm.py", "rollout/vllm_private.py"},
    "rlhf.patches.replace": {"model/megatron_private.py", "rollout/vllm_private.py", "parallel/cpu.py"},
    "megatron.core.parallel_state": {"parallel/mesh.py"},
    "os.environ": {"__main__.py", "parallel/mesh.py", "rollout/vllm.py", "judge/client.py"},
}
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "base", "manager"}
MAX_KEYS, MAX_FUNCTION, MAX_FILE = 150, 60, 350


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(), str(path))))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part(path: Path) -> str:
    """Return the part: rlhf/train/learner.py -> train, rlhf/loop.py -> loop."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Return the dotted names of all imports of a file. `from a import b` is a.b."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(dotted: str, *modules: str) -> bool:
    return any(dotted == module or dotted.startswith(module + ".") for module in modules)


def dotted_name(node: ast.AST | None) -> str:
    """Return `a.b.c` as text. It is empty for everything but names and attributes."""
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def last(node: ast.AST | None) -> str:
    return dotted_name(node).rpartition(".")[2]


def places(found: Iterator[tuple[Path, ast.AST]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{node.lineno}" for path, node in found]


def test_imports_point_one_way():
    assert {part(path) for path in MODULES} <= DEPTH.keys(), "every part has a layer"
    wrong = []
    for path in MODULES:
        here = part(path)
        for dotted in imports(path):
            there = dotted.split(".")[1] if within(dotted, "rlhf") else ""
            if there not in DEPTH or there == here:
                continue
            sibling = within(dotted, *(f"rlhf.{module}" for module in SIBLINGS.get(here, ())))
            if not sibling and DEPTH[there] >= DEPTH[here]:
                wrong.append(f"{name(path)} imports {dotted}")
    assert wrong == []


def test_algorithms_import_little():
    """Formulas need neither process groups nor engines.

    The help reads these files, so they import neither numpy nor torch.
    """
    allowed = (
        "errors",
        "lazy",
        "config",
        "contracts",
        "algorithms.functional",
        "algorithms.dpo.DPO",
    )  # online DPO extends DPO
    ours = tuple(f"rlhf.{module}" for module in allowed)
    algorithms = [
        path for path in MODULES if part(path) == "algorithms" and path.name != "__init__.py"
    ]  # that one is the table
    assert [d for path in algorithms for d in imports(path) if within(d, "rlhf") and not within(d, *ours)] == []
    assert [
        d for path in algorithms for d in imports(path) if within(d, "numpy", "torch") and d != "torch.Tensor"
    ] == []


def test_a_mode_is_named_in_one_place():
    """Only the table in rlhf/algorithms contains the names of modes.

    Some names are also those of a role, a section or a metric ("reward", "dpo"). They count only in comparisons of a
    mode.
    """
    own = {"sft", "online-dpo"}
    named = [
        (path, node) for path in MODULES for node in nodes(path) if isinstance(node, ast.Constant) and node.value in own
    ]
    assert {name(path) for path, _ in named} <= {
        "algorithms/__init__.py",
        "config.py",
    }  # config.py has the default of Config.mode
    compared = []
    for path in MODULES:
        for node in nodes(path):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                texts = {text.value for side in sides for text in ast.walk(side) if isinstance(text, ast.Constant)}
                if any(last(side) == "mode" for side in sides) and texts & set(ALGORITHMS):
                    compared.append((path, node))
    assert places(iter(compared)) == []


def test_a_family_is_named_in_one_place():
    """Its row in rlhf/model/families.py has all differences, so no other file contains the name of a family."""
    own = {text for row in FAMILIES.values() for text in (row.name, row.classes)} | set(CLASSES)
    named = (
        (path, node) for path in MODULES for node in nodes(path) if isinstance(node, ast.Constant) and node.value in own
    )
    assert places((path, node) for path, node in named if name(path) != "model/families.py") == []


def test_an_engine_has_one_owner():
    """Only rlhf/rollout/owner.py and the engines themselves call its methods."""
    methods = {m for m in vars(Engine) if not m.startswith("_")} - {"parameters"}  # models have parameters, too
    assert methods == {"submit", "advance", "withdraw", "generate", "sleep", "wake_weights", "wake"}
    calls = [
        (path, c)
        for path in MODULES
        for c in nodes(path)
        if isinstance(c, ast.Call) and isinstance(c.func, ast.Attribute)
    ]
    assert {name(path) for path, c in calls if last(c.func.value) == "engine" and c.func.attr in methods} == {
        "rollout/owner.py"
    }
    sleeping = {
        (name(path), dotted_name(c.func)) for path, c in calls if c.func.attr in ("sleep", "wake_weights", "wake")
    }
    assert {place for place, called in sleeping if called not in ("time.sleep", "asyncio.sleep", "self.llm.sleep")} == {
        "rollout/owner.py"
    }
    built = [
        (path, node) for path in MODULES for node in nodes(path) if last(getattr(node, "annotation", None)) == "Engine"
    ]
    assert {name(path) for path, _ in built} == {"rollout/owner.py"}
    source = [
        node
        for node in nodes(PACKAGE / "rollout/source.py")
        if isinstance(node, ast.AnnAssign) and last(node.target) == "owner"
    ]
    assert [last(node.annotation) for node in source] == ["EngineOwner"]


@pytest.mark.parametrize("what", ONLY_IN)
def test_few_files_know(what):
    names = (what, "os.getenv") if what == "os.environ" else (what,)
    importing = {name(path) for path in MODULES for dotted in imports(path) if within(dotted, *names)}
    using = {name(path) for path in MODULES for node in nodes(path) if dotted_name(node) in names}
    assert importing | using <= ONLY_IN[what]


def test_private_names_are_replaced_by_patches_only():
    """A plain assignment to a name of megatron-core or vLLM never fails, even if that name does not exist."""
    wrong = []
    for path in MODULES:
        imported = [node for node in nodes(path) if isinstance(node, ast.Import | ast.ImportFrom)]
        theirs = {
            (alias.asname or alias.name).partition(".")[0]
            for node in imported
            for alias in node.names
            if within(getattr(node, "module", alias.name), "megatron", "vllm")
        }
        for node in nodes(path):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            changed = [target for target in targets if isinstance(target, ast.Attribute)]
            changed += node.args[:1] if isinstance(node, ast.Call) and last(node.func) == "setattr" else []
            if theirs & {name.id for target in changed for name in ast.walk(target) if isinstance(name, ast.Name)}:
                wrong.append((path, node))
    assert places(iter(wrong)) == []


def test_functions_are_short():
    functions = ((path, node) for path in EVERYTHING for node in nodes(path) if isinstance(node, ast.FunctionDef))
    assert places((path, f) for path, f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION) == []


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in EVERYTHING}
    assert {path: count for path, count in lines.items() if count > MAX_FILE} == {}


def test_names_say_something():
    assert [path for path in EVERYTHING if VAGUE & {*path.stem.split("_"), path.parent.name}] == []
    assert [name(path) for path in MODULES if path.stem in sys.stdlib_module_names] == [], (
        "named like the standard library"
    )


def test_log_probs_are_called_logp():
    def ours(node: ast.AST) -> str:  # the name that this node defines
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            return node.name
        if isinstance(node, ast.arg):
            return node.arg
        return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else ""

    names = ((path, node) for path in MODULES for node in nodes(path))
    assert places((path, node) for path, node in names if "logprob" in ours(node).replace("_", "").lower()) == []


def test_no_handler_catches_everything():
    def everything(handler: ast.ExceptHandler) -> bool:
        types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        return any(last(kind) in ("", "Exception", "BaseException") for kind in types)

    handlers = ((path, node) for path in MODULES for node in nodes(path) if isinstance(node, ast.ExceptHandler))
    assert places((path, handler) for path, handler in handlers if everything(handler)) == []


def test_nobody_guesses_at_the_configuration():
    calls = ((path, node) for path in MODULES for node in nodes(path) if isinstance(node, ast.Call))
    guesses = (
        (path, c)
        for path, c in calls
        if last(c.func) in ("getattr", "hasattr", "setattr") and last(c.args[0]) == "config"
    )
    assert places(guesses) == []


def sections() -> dict[str, type]:
    """Return the sections of the configuration, from name ("" for the top) to class."""
    return {"": Config} | {key: hint for key, hint in configuration.keys(Config).items() if is_dataclass(hint)}


def keys() -> list[str]:
    return [
        f"{section}.{f.name}".lstrip(".")
        for section, cls in sections().items()
        for f in fields(cls)
        if f.name not in {*sections(), "sections"}
    ]


def test_keys_are_few_and_explained():
    assert len(keys()) <= MAX_KEYS
    bare = [
        f"{cls.__name__}.{f.name}" for cls in sections().values() for f in fields(cls) if not notes(cls).get(f.name)
    ]
    whole = {f"Config.{section}" for section in sections() if section and section not in SECTIONS}
    assert set(bare) == whole, "only whole sections have no comment"


def assignments(path: Path) -> Iterator[tuple[str, str]]:
    """Return the last identifiers of target and value: `a, self.b = x.c, d` gives (a, c) and (b, d)."""
    for node in nodes(path):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs = zip(target.elts, node.value.elts, strict=True) if both else [(target, node.value)]
                yield from ((last(into), last(value)) for into, value in pairs)


def owners(path: Path) -> dict[str, set[str]]:
    """Return the names that a file may use for each section.

    These are the section's name, parameters of its class, and variables to which it was assigned.
    """
    called = {section: {section or "config"} for section in sections()}
    for algorithm in ALGORITHMS.values():
        if algorithm.section and algorithm.__module__ == f"rlhf.{name(path).removesuffix('.py').replace('/', '.')}":
            called[algorithm.section[0]].add("keys")
    for section, cls in sections().items():
        parameters = (
            node for node in nodes(path) if isinstance(node, ast.arg) and last(node.annotation) == cls.__name__
        )
        called[section] |= {node.arg for node in parameters}
        for into, value in assignments(path):  # in the order of the file, so that an alias of an alias counts
            if value in called[section]:
                called[section].add(into)
    return called


def test_no_key_is_accepted_and_ignored():
    used = {"mode"}  # selects the program itself
    for path in MODULES:
        if name(path) == "config.py":
            continue
        reads = {(last(node.value), node.attr) for node in nodes(path) if isinstance(node, ast.Attribute)}
        for section, called in owners(path).items():
            used |= {f"{section}.{attribute}".lstrip(".") for owner, attribute in reads if owner in called}
    assert sorted(set(keys()) - used) == []

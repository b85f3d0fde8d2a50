"""Makes megatron-core run on machines without CUDA.

The source of megatron-core names the CUDA device. An import hook rewrites these names while modules of `megatron.core`
are imported. It does not patch torch, and it intercepts nothing at run time. On a machine with CUDA, it does nothing.

So tests on a CPU run a slightly different program than a GPU does. The hook does not know calls of torch.cuda that a
new version adds. Such a call raises an error of torch when it runs.
"""

import ast
import hashlib
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType

import torch

from rlhf.patches import replace

# Calls that are replaced including their arguments, and functions that are replaced by CPU functions.
CALLS = {
    "torch.cuda.current_device": "'cpu'",
    "torch.cuda.current_stream": "None",
    "torch.cuda.empty_cache": "None",
    "torch.cuda.synchronize": "None",
    "torch.cuda.get_rng_state": "torch.get_rng_state()",
    "torch.cuda.random.get_rng_state": "torch.get_rng_state()",
}
FUNCTIONS = {
    "torch.cuda.manual_seed": "torch.manual_seed",
    "torch.cuda.set_rng_state": "torch.set_rng_state",
    "enable_jit_fuser": "disable_jit_fuser",  # torch.compile takes seconds here and saves nothing on a CPU
}
CUDA_ONLY_ARGUMENTS = ("pin_memory", "device_ids")
RULES = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


class _Rewriter(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if name in CALLS:
            return ast.copy_location(ast.parse(CALLS[name], mode="eval").body, node)
        if name in FUNCTIONS:
            node.func = ast.copy_location(ast.parse(FUNCTIONS[name], mode="eval").body, node.func)
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            return node.func.value  # x.cuda(...) is x
        node.keywords = [k for k in node.keywords if k.arg not in CUDA_ONLY_ARGUMENTS]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value == "cuda":
            node.value = "cpu"
        elif isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            node.value = node.value.replace(".cuda", "")  # compared with tensor.type()
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles rewritten source. Its bytecode is cached beside Python's, in a file that only this loader reads."""

    def source_to_code(self, data: bytes, path: str, *, _optimization: int = -1) -> CodeType:  # type: ignore[override]
        tree = _Rewriter().visit(ast.parse(data, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def get_data(self, path: str) -> bytes:
        return super().get_data(_cached(path))

    def set_data(self, path: str, data: bytes, **options: int) -> None:  # type: ignore[override]
        super().set_data(_cached(path), data, **options)


def _cached(path: str) -> str:
    """Return the path of rewritten bytecode, which changes with this file. Other paths stay as they are."""
    return path.removesuffix(".pyc") + f".{RULES}.pyc" if path.endswith(".pyc") else path


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None):
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Install the hook. Call it before the first import of megatron.core. It does nothing if CUDA is available."""
    if torch.cuda.is_available() or _Finder in sys.meta_path:
        return
    assert "megatron.core" not in sys.modules, "cpu.install() must come before the first import of megatron.core"
    sys.meta_path.insert(0, _Finder)
    import megatron.core.tensor_parallel.random as random

    replace(random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: torch.set_rng_state(state))

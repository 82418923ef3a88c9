"""Does every module import, and does the package keep its shape: rows, sizes, one compile file?"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fasteagle"

# A module may import earlier rows and its own folder.
ROWS = (
    {"triton_attention", "triton_cache", "safewrite", "processor", "errors"},
    {"step_files"},
    {"config", "tree", "metrics", "compile", "sample", "demo", "memory", "clock"},
    {
        "cache",
        "rope",
        "detokenize",
        "tokenizer_files",
        "chat",
        "hf_config",
        "expert_names",
        "attention_trial",
    },
    {"tokenizer_models", "routing", "tree_attention"},
    {"tokenizer"},
    {"families", "quant", "accept", "weights", "hub", "prompt_files"},
    {"panel", "windows", "heads", "experts", "dtypes"},
    {"model", "source"},
    {"draft", "parameters"},
    {"request", "rounds", "fill", "footprint"},
    {"seats", "ahead"},
    {"engine"},
    {"checkpoint", "tree_file", "parts"},
    {"assemble", "calibrate", "compat_tokenizer", "quantize"},
    {"compat", "quantize_gptq", "tuning"},
    {"tune"},
    {"train", "evaluate", "serve"},
    {"commands"},
    {"__main__"},
)
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}
EXTRA_FOLDERS = {"train", "evaluate", "serve"}
EXTRA_PACKAGES = {"accelerate", "fastapi", "gradio", "uvicorn"}  # not part of the dev install
# Imported where a GPU is used.
NEED_TRITON = {
    "triton_attention", "triton_cache", "triton_expert_kernels", "triton_experts", "triton_kernels",
    "triton_ops",
}  # fmt: skip
NOT_IN_CORE = {"transformers", "gradio", "fastapi"}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def script_files() -> list[Path]:
    patterns = ("generate.py", "convert/*.py", "quantize/*.py", "bench/*.py")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_name(path: Path) -> str:
    """`fasteagle/draft/eagle.py` -> `draft`, `fasteagle/tree.py` -> `tree`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(source: str, *, package: str) -> list[str]:
    """Every imported dotted name, at any depth of the source; `from a import b` gives `a.b`."""
    names = []
    folders = package.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) - node.level + 1] if node.level else []
            origin = [*base, node.module] if node.module else base
            names += [".".join([*origin, alias.name]) for alias in node.names]
    return names


def imports_against_rows(source: str, *, package: str, top: str) -> list[str]:
    """The imports of a module that come from its own row or a later one, as dotted names."""
    wrong = []
    for name in imported_names(source, package=package):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if root != "fasteagle" or target in {"", "__version__", top}:
            continue
        # What the package face re-exports has no row, so it counts as the last one.
        if ROW_OF.get(target, len(ROWS)) >= ROW_OF[top]:
            wrong.append(name)
    return wrong


def function_lengths(source: str) -> dict[str, int]:
    """Lines of every function from `def` to its end, without its docstring and blank lines."""
    lines = source.splitlines()

    def filled(node: ast.stmt) -> int:
        return sum(bool(line.strip()) for line in lines[node.lineno - 1 : node.end_lineno])

    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = filled(node.body[0]) if ast.get_docstring(node) is not None else 0
            lengths[f"{node.name}:{node.lineno}"] = filled(node) - docstring
    return lengths


def compile_mentions(source: str) -> list[str]:
    """Uses of torch.compile or a CUDA graph in code; comments and strings do not count."""
    names = imported_names(source, package="")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Name):
            names.append(ast.unparse(node))
    return [
        name
        for name in names
        if name == "torch.compile" or name.endswith("cuda.graph") or "CUDAGraph" in name
    ]


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_every_module_imports(path: Path) -> None:
    try:
        importlib.import_module(module_name(path))
    except ModuleNotFoundError as error:
        extra = error.name in EXTRA_PACKAGES and top_name(path) in EXTRA_FOLDERS
        if not extra and path.stem not in NEED_TRITON:
            raise
        pytest.skip(f"{error.name} is not installed; it comes with an extra or with CUDA's torch")


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_a_module_imports_only_earlier_rows_and_its_own_folder(path: Path) -> None:
    top = top_name(path)
    if top == "__init__":
        return
    assert top in ROW_OF, f"fasteagle/{top} is in no row: add it to ROWS above"
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    wrong = imports_against_rows(path.read_text(), package=package, top=top)
    assert not wrong, f"{name} imports {wrong}, not of an earlier row"


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_the_core_never_imports_a_framework(path: Path) -> None:
    if top_name(path) in EXTRA_FOLDERS:
        return
    roots = {name.partition(".")[0] for name in imported_names(path.read_text(), package="")}
    assert not roots & NOT_IN_CORE


@pytest.mark.parametrize("path", [*package_files(), *script_files()], ids=module_name)
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text()
    n_lines = len(source.splitlines())
    assert n_lines <= MAX_FILE_LINES, f"{n_lines} lines: split it"
    long = {name: n for name, n in function_lengths(source).items() if n > MAX_FUNCTION_LINES}
    assert not long, f"over {MAX_FUNCTION_LINES} lines: {long}"


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_only_compile_compiles(path: Path) -> None:
    if path != PACKAGE / "compile.py":
        assert not compile_mentions(path.read_text())


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("from fasteagle.config import ModelConfig", []),
        ("from fasteagle import __version__, accept", []),
        ("from fasteagle.model import Transformer", []),
        ("from .base import Drafter", []),
        ("from ..engine import Engine", ["fasteagle.engine.Engine"]),
        ("def late():\n    from fasteagle import engine", ["fasteagle.engine"]),
        ("from fasteagle import load", ["fasteagle.load"]),
        ("import fasteagle.commands.main", ["fasteagle.commands.main"]),
    ],
)
def test_a_later_row_is_noticed(line: str, wrong: list[str]) -> None:
    assert imports_against_rows(line, package="fasteagle.draft", top="draft") == wrong


def test_function_length_leaves_out_docstring_and_blanks() -> None:
    source = 'def f(x):\n    """One.\n\n    Two.\n    """\n\n    # Why.\n    return x\n'
    assert function_lengths(source) == {"f:1": 3}


@pytest.mark.parametrize(
    ("line", "n_found"),
    [
        ("step = torch.compile(step)", 1),
        ("from torch import compile", 1),
        ("graph = torch.cuda.CUDAGraph()", 1),
        ("with torch.cuda.graph(pool): pass", 1),
        ("torch.compiler.reset()  # not torch.compile", 0),
        ("from fasteagle.compile import warm_up", 0),
    ],
)
def test_a_compile_call_is_noticed(line: str, n_found: int) -> None:
    assert len(compile_mentions(line)) == n_found

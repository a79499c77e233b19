"""Which package imports which, and which faults can be planted. Ruff knows who may print or touch
the environment (pyproject.toml)."""

import ast
from pathlib import Path

from programs import program

ROOT = Path(__file__).parent.parent

# A package or module of gpt may import itself and those of a lower layer, none of its own layer.
LAYERS = [
    {"errors", "wording"},
    {"config", "distributed", "compile_log", "hardware", "digest"},
    {"cli"},  # for entry points alone
    {"presets", "data", "sharding", "flops", "checkpoint"},
    {"model"},
    {"training", "sampling"},
    {"__init__", "terminal"},  # __init__: the public names
    {"bench", "convert", "evaluate", "plan", "reports", "train_flags", "sample_flags"},
    {"report", "tour"},
]
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
ENTRY_POINTS = {"__init__", "train_flags", "sample_flags", "report", "tour"}
WITHOUT_JAX = ("gpt/data/", "gpt/sampling/completion.py", "gpt/cli.py", "gpt/terminal.py")
WITHOUT_JAX += ("gpt/train_flags.py", "gpt/sample_flags.py")

SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "gpt").rglob("*.py"))
}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports by full name, please"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(name: str, tree: ast.AST) -> set[str]:
    """The parts of gpt that the file `name` imports and may not; `import gpt` is `__init__`."""
    here = Path(name).with_suffix("").parts[1]
    is_entry_point = here in ENTRY_POINTS or name.endswith("/__main__.py")
    wrong = set()
    for dotted in imports(tree):
        package, part, *_ = *dotted.split("."), "__init__"
        part = part if part in LAYER else "__init__"
        if package != "gpt" or part == here:
            continue
        if part == "cli" and is_entry_point:
            continue
        if part == "cli" or LAYER[part] >= LAYER[here]:
            wrong.add(part)
    return wrong


def test_imports_go_one_way():
    wrong = {name: wrong_imports(name, tree) for name, tree in SOURCES.items()}
    assert {name: parts for name, parts in wrong.items() if parts} == {}
    tree = ast.parse("import gpt.sampling.sampler\nfrom gpt import training, cli\nimport gpt")
    assert wrong_imports("gpt/training/loss.py", tree) == {"sampling", "__init__", "cli"}
    assert wrong_imports("gpt/bench/__main__.py", tree) == set()


def test_these_import_no_jax():
    for start in WITHOUT_JAX:
        names = [name for name in SOURCES if name.startswith(start)]
        assert names, f"there is no {start}"
        for name in names:
            heads = {dotted.split(".")[0] for dotted in imports(SOURCES[name])}
            assert not heads & {"jax", "flax", "optax", "orbax"}, name


def test_every_fault_of_the_list_can_be_planted():
    """Where a line was rewritten, the list of `make faults` has to follow."""
    planted = program("benchmarks/planted_faults")
    assert planted.find_problems(planted.FAULTS) == []

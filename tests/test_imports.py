"""Which package imports which, who may print or read flags, which faults can be planted."""

import ast
from pathlib import Path

from programs import program

ROOT = Path(__file__).parent.parent

# A package or module of gpt may import itself and those of a lower layer, none of its own layer.
LAYERS = [
    {"errors", "wording"},
    {"config", "distributed", "compile_log", "hardware", "digest"},
    {"presets", "data", "sharding", "flops", "checkpoint"},
    {"model"},
    {"training", "sampling"},
    {"__init__", "terminal"},  # __init__: the public names
    {"bench", "convert", "evaluate", "plan", "reports", "train_flags", "sample_flags"},
    {"report", "tour"},
]
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
CLI = "cli"  # it imports the lowest layers alone, and is imported by entry points alone
ENTRY_POINTS = {"train.py", "sample.py", "gpt/cli.py", "gpt/terminal.py", "gpt/report.py"}
ENTRY_POINTS |= {"gpt/tour.py", "gpt/train_flags.py", "gpt/sample_flags.py"}
ENTRY_POINTS |= {"gpt/__init__.py"}  # what python -m gpt.bench and the like import first
WITHOUT_JAX = ("gpt/data/", "gpt/sampling/completion.py", "gpt/cli.py", "gpt/terminal.py")
WITHOUT_JAX += ("gpt/train_flags.py", "gpt/sample_flags.py")

# What only entry points may use, by module.
OUTSIDE = {"sys": {"argv", "stdout", "stdin"}, "os": {"environ", "environb", "getenv", "putenv"}}

SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "gpt").rglob("*.py")])
}


def is_entry_point(name: str) -> bool:
    return name in ENTRY_POINTS or name.endswith("/__main__.py")


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


def imported_parts(tree: ast.AST) -> set[str]:
    """The parts of gpt that a file imports; `import gpt` itself is `__init__`."""
    found = set()
    for dotted in imports(tree):
        head, *rest = dotted.split(".")
        if head == "gpt":
            found.add(rest[0] if rest and rest[0] in {*LAYER, CLI} else "__init__")
    return found


def wrong_imports(name: str, tree: ast.AST) -> set[str]:
    """The parts of gpt that the file `name` imports and may not."""
    imported = imported_parts(tree)
    wrong = set()
    if CLI in imported and not is_entry_point(name):
        wrong.add(CLI)
    if name == "gpt/cli.py":
        wrong |= {other for other in imported - {CLI} if LAYER[other] > LAYER["config"]}
    elif name.startswith("gpt/"):
        here = Path(name).with_suffix("").parts[1]
        wrong |= {other for other in imported - {here, CLI} if LAYER[other] >= LAYER[here]}
    return wrong


def outside_uses(tree: ast.AST) -> list[str]:
    """Where a file prints, or reads the command line or the environment."""
    uses = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="print" | "input" as called)):
                uses.append(f"line {node.lineno}: {called}")
            case ast.Attribute(value=ast.Name(id=module), attr=attribute):
                if attribute in OUTSIDE.get(module, ()):
                    uses.append(f"line {node.lineno}: {module}.{attribute}")
            case ast.ImportFrom(module=module, names=names):
                barred = [alias.name for alias in names if alias.name in OUTSIDE.get(module, ())]
                uses += [f"line {node.lineno}: {attribute}" for attribute in barred]
    return uses


def test_imports_go_one_way():
    wrong = {name: wrong_imports(name, tree) for name, tree in SOURCES.items()}
    assert {name: parts for name, parts in wrong.items() if parts} == {}


def test_only_entry_points_touch_the_outside():
    uses = {n: outside_uses(tree) for n, tree in SOURCES.items() if not is_entry_point(n)}
    assert {name: lines for name, lines in uses.items() if lines} == {}


def test_these_import_no_jax():
    for start in WITHOUT_JAX:
        names = [name for name in SOURCES if name.startswith(start)]
        assert names, f"there is no {start}"
        for name in names:
            heads = {dotted.split(".")[0] for dotted in imports(SOURCES[name])}
            assert not heads & {"jax", "flax", "optax", "orbax"}, name


def test_the_rules_notice_what_they_forbid():
    tree = ast.parse("import gpt.sampling.sampler\nfrom gpt import training, cli\nimport gpt")
    assert wrong_imports("gpt/training/loss.py", tree) == {"sampling", "__init__", "cli"}
    assert wrong_imports("gpt/bench/__main__.py", tree) == set()
    assert wrong_imports("gpt/cli.py", tree) == {"sampling", "training", "__init__"}
    tree = ast.parse("print(os.environ, sys.argv)\nfrom os import environ")
    assert len(outside_uses(tree)) == 4


def test_every_fault_of_the_list_can_be_planted():
    """Where a line was rewritten, the list of `make faults` has to follow."""
    planted = program("benchmarks/planted_faults")
    assert planted.find_problems(planted.FAULTS) == []

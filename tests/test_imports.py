"""Which package imports which, and who may print or read flags, from the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENTRY_POINTS = {"train.py", "sample.py", "gpt/cli.py", "gpt/terminal.py", "gpt/__main__.py"}
ENTRY_POINTS |= {"gpt/report.py", "gpt/tour.py", "gpt/train_flags.py", "gpt/sample_flags.py"}

# A package or module of gpt may import itself and those of a lower layer, none of its own layer.
LAYERS = {
    "errors": 0,
    "config": 1,
    "distributed": 1,
    "compile_log": 1,
    "hardware": 1,
    "digest": 1,
    "presets": 2,
    "data": 2,
    "sharding": 2,
    "flops": 2,
    "checkpoint": 2,
    "model": 3,
    "training": 4,
    "sampling": 4,
    "__init__": 5,  # the public names
    "terminal": 5,
    "bench": 6,
    "convert": 6,
    "plan": 6,
    "reports": 6,
    "train_flags": 6,
    "sample_flags": 6,
    "report": 7,
    "tour": 7,
}
CLI = "cli"
WITHOUT_JAX = ("gpt/data", "gpt/sampling/text_stream", "gpt/cli", "gpt/terminal")
WITHOUT_JAX += ("gpt/train_flags", "gpt/sample_flags")

SOURCES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *(ROOT / "gpt").rglob("*.py")]
)
TREES = {name: ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in SOURCES}


def is_entry_point(name: str) -> bool:
    return name in ENTRY_POINTS or name.endswith("/__main__.py")


def part(name: str) -> str:
    """`gpt/model/kv_cache.py` -> `model`, `gpt/flops.py` -> `flops`, `train.py` -> `train`."""
    parts = Path(name).with_suffix("").parts
    return parts[1] if parts[0] == "gpt" else parts[0]


def imports(tree: ast.AST, name: str = "gpt/x.py") -> set[str]:
    """Dotted names of everything a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports by full name, please (line {node.lineno})"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_parts(tree: ast.AST) -> set[str]:
    """The parts of gpt that a file imports; `import gpt` itself is `__init__`."""
    found = set()
    for dotted in imports(tree):
        head, *rest = dotted.split(".")
        if head == "gpt":
            inside = rest and ((ROOT / "gpt" / rest[0]).is_dir() or rest[0] in {*LAYERS, CLI})
            found.add(rest[0] if inside else "__init__")
    return found


def wrong_imports(name: str, tree: ast.AST) -> list[str]:
    """The parts of gpt that the file `name` imports and may not."""
    imported = imported_parts(tree)
    wrong = []
    if CLI in imported and not is_entry_point(name):
        wrong.append(CLI)
    if name.startswith("gpt/") and part(name) != CLI:
        here = part(name)
        wrong += [other for other in imported - {here, CLI} if LAYERS[other] >= LAYERS[here]]
    elif part(name) == CLI:
        wrong += [other for other in imported if LAYERS[other] > LAYERS["config"]]
    return wrong


def forbidden_uses(tree: ast.AST) -> list[str]:
    """Where a file prints, or reads the command line or the environment."""
    uses = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="print" | "input" as called)):
                uses.append(f"line {node.lineno}: {called}")
            case ast.Attribute(value=ast.Name(id="sys"), attr="argv" | "stdout" | "stdin" as attr):
                uses.append(f"line {node.lineno}: sys.{attr}")
            case ast.Attribute(
                value=ast.Name(id="os"), attr="environ" | "environb" | "getenv" | "putenv" as attr
            ):
                uses.append(f"line {node.lineno}: os.{attr}")
            case ast.ImportFrom(module="os" | "sys", names=names):
                barred = {"argv", "environ", "getenv", "stdout", "stdin"}
                uses += [f"line {node.lineno}: {a.name}" for a in names if a.name in barred]
    return uses


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_one_way(name):
    if name.startswith("gpt/"):
        assert part(name) in {*LAYERS, CLI}, f"{name}: give it a layer in LAYERS"
    assert not wrong_imports(name, TREES[name])


@pytest.mark.parametrize("name", [n for n in SOURCES if not is_entry_point(n)])
def test_only_entry_points_touch_the_outside(name):
    assert not forbidden_uses(TREES[name])


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith(WITHOUT_JAX)])
def test_these_import_no_jax(name):
    heads = {dotted.split(".")[0] for dotted in imports(TREES[name])}
    assert not heads & {"jax", "flax", "optax", "orbax"}


def test_each_of_these_is_there():
    assert all(any(n.startswith(start) for n in SOURCES) for start in WITHOUT_JAX)


def test_the_rules_notice_what_they_forbid():
    tree = ast.parse("import gpt.sampling.sampler\nfrom gpt import training, cli\nimport gpt")
    assert imported_parts(tree) == {"sampling", "training", "cli", "__init__"}
    assert set(wrong_imports("gpt/training/loss.py", tree)) == {"sampling", "__init__", "cli"}
    assert set(wrong_imports("gpt/bench/__main__.py", tree)) == set()
    assert wrong_imports("gpt/model/kv_cache.py", ast.parse("from gpt.training.loss import loss"))
    assert not wrong_imports(
        "gpt/training/train_step.py", ast.parse("from gpt.model import transformer")
    )
    assert (
        len(forbidden_uses(ast.parse("print(os.environ, sys.argv)\nfrom os import environ"))) == 4
    )

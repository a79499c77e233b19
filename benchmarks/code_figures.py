"""Count what there is to read in the code: lines, files, imports and functions.

    python benchmarks/code_figures.py [CHECKOUT] [--json]

The product is every Python file under gpt/, plus train.py and sample.py. The imports are measured
by training for one step on the CPU, so the project's requirements must be installed. Everything
else is read from the source.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Runs train.py as a script. When the interpreter exits, it writes the paths of the loaded modules
# of gpt/ to the file named by the first argument.
RUN_TRAIN = """
import atexit, json, runpy, sys

report, *flags = sys.argv[1:]

def write_report():
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "gpt"]
    with open(report, "w") as file:
        json.dump([module.__file__ for module in modules], file)

atexit.register(write_report)
sys.argv = ["train.py", *flags]
runpy.run_path("train.py", run_name="__main__")
"""

TINY_RUN = ["--steps=1", "--tokenizer=byte", "--seq-len=16", "--batch-size=4"]
TINY_RUN += ["--model.n-layers=1", "--model.d-model=16", "--model.n-heads=1"]
TINY_RUN += ["--sample-every=0", "--eval-tokens=64", "--no-compile-cache"]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def count_lines(paths: list[Path]) -> int:
    """Total number of lines, including blank lines and comments."""
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def files_imported_to_train(checkout: Path) -> list[Path]:
    """train.py and the modules of gpt/ imported by the end of a one-step run."""
    with tempfile.TemporaryDirectory() as folder:
        text, report, out = (Path(folder) / name for name in ("text.txt", "modules.json", "run"))
        text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
        flags = [*TINY_RUN, f"--data={text}", f"--out={out}"]
        # Keep bytecode and caches out of the checkout and the user's home.
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(checkout),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": folder,
        }
        command = [sys.executable, "-c", RUN_TRAIN, str(report), *flags]
        run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            sys.exit(f"error: train.py exited with code {run.returncode}:\n{run.stderr}")
        loaded = {Path(path).resolve() for path in json.loads(report.read_text())}
    package = checkout / "gpt"
    return [checkout / "train.py", *(path for path in loaded if path.is_relative_to(package))]


def last_name(node: ast.expr) -> str | None:
    """`c` for the expressions `c` and `a.b.c`; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    return None


def first_training_step(train: ast.Module) -> int | None:
    """The line of the first call of `train_step` or `something.train_step`, if there is one."""
    calls = [node for node in ast.walk(train) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if last_name(call.func) == "train_step"]
    return min(lines, default=None)


def body_lines(function: Function) -> int:
    """Source lines from the first to the last statement, not counting the docstring."""
    statements = function.body
    if ast.get_docstring(function) is not None:
        statements = statements[1:]
    if not statements:
        return 0
    return statements[-1].end_lineno - statements[0].lineno + 1


def count_references(tree: ast.AST) -> Counter[str]:
    """How often each name is read, as `name` or `something.name`. Imports do not count."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)]
    return Counter(last_name(node) for node in nodes if isinstance(node.ctx, ast.Load))


def count_single_callers(trees: list[ast.Module], functions: list[Function]) -> int:
    """Number of functions whose name is read exactly once outside their own definition.

    This is an estimate by name: reading a variable or an attribute of the same name counts as a
    call, and so does passing the function on without calling it. Special methods and properties
    are ignored, and so are names defined more than once, since their callers cannot be told apart.
    That leaves out the methods of a Protocol, which its implementations define again. A callback
    that only a library calls has no caller here.
    """
    references = sum((count_references(tree) for tree in trees), Counter())
    definitions = Counter(function.name for function in functions)
    count = 0
    for function in functions:
        name = function.name
        decorators = {last_name(decorator) for decorator in function.decorator_list}
        if name.startswith("__") or decorators & {"property", "cached_property"}:
            continue
        callers = references[name] - count_references(function)[name]
        if definitions[name] == 1 and callers == 1:
            count += 1
    return count


def measure(checkout: Path) -> dict[str, float | None]:
    """All figures by name."""
    train, sample = checkout / "train.py", checkout / "sample.py"
    product = [*checkout.glob("gpt/**/*.py"), train, sample]
    imported = files_imported_to_train(checkout)
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in product]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, Function)]
    lines = count_lines(product)
    return {
        "product_lines": lines,
        "product_files": len(product),
        "test_lines": count_lines(list(checkout.glob("tests/**/*.py"))),
        "lines_of_train_py": count_lines([train]),
        "lines_of_sample_py": count_lines([sample]),
        "line_of_first_training_step": first_training_step(trees[product.index(train)]),
        "files_imported_to_train": len(imported),
        "lines_imported_to_train": count_lines(imported),
        "functions_per_1000_lines": round(1000 * len(functions) / lines, 1),
        "functions_of_at_most_3_lines": sum(body_lines(function) <= 3 for function in functions),
        "functions_with_one_caller": count_single_callers(trees, functions),
    }


def main() -> None:
    """Print the figures of a checkout as a table or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    this_checkout = Path(__file__).parent.parent
    parser.add_argument("checkout", nargs="?", type=Path, default=this_checkout, metavar="CHECKOUT")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    if not (checkout / "train.py").exists():
        parser.error(f"{checkout} is not a checkout of this project: it has no train.py")

    figures = measure(checkout)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        shown = "none" if value is None else f"{value:,}"
        print(f"{name.replace('_', ' '):30}{shown:>8}")


if __name__ == "__main__":
    main()

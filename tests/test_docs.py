"""README.md and docs/: every command parses, every flag and every linked file exists, and the
guides can be followed."""

import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import standin_tokenizers
import standins
import tyro
from programs import ROOT, call, program, succeed
from safetensors.numpy import load_file

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {
    "gpt.bench": "gpt/bench/__main__",
    "gpt.convert": "gpt/convert/__main__",
    "gpt.data": "gpt/data/__main__",
    "gpt.evaluate": "gpt/evaluate/__main__",
    "gpt.report": "gpt/report",
    "gpt.tour": "gpt/tour",
}
# They have positional arguments only; the test just checks that the file exists.
WITHOUT_FLAGS = {"benchmarks/pods", "benchmarks/importing"}
OTHERS = {"--logdir", "--model", "--xla"}  # flags of tensorboard, of lm_eval and of XLA
# Placeholders for what a reader fills in.
PLACEHOLDERS = {"N": "1", "ID": "1", "VALUE": "1"}


def in_blocks(path: Path) -> list[list[str]]:
    """The commands of a document's blocks, as words, which a reader copies one after the other."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return commands("\n".join(blocks).replace("\\\n", " ").splitlines())


def typed(path: Path) -> list[list[str]]:
    """The commands of a document: in blocks, in indented lines, between backticks."""
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^ {4}(\S.*?)(?: {2,}.*)?$", prose, re.MULTILINE)
    lines += re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)
    return in_blocks(path) + commands(lines)


def commands(lines: list[str]) -> list[list[str]]:
    """The words of those lines that are commands of ours."""
    found = [words_of(line) for line in lines]
    return [words for words in found if words]


def words_of(line: str) -> list[str]:
    """The words of a command from `train.py`, `sample.py`, `-m` or a script's path on, or from
    `make` on; none if the line is not one of our commands."""
    line = " ".join(line.split())
    found = re.match(r"(?:\$ |srun )?(?:\.venv/bin/)?python (.*)|((?:train|sample)\.py .*)", line)
    if not found:
        return shlex.split(line) if line.startswith("make ") else []
    words = shlex.split(found[1] or found[2], comments=True)
    words = [PLACEHOLDERS.get(word, word) for word in words]
    return [] if {"...", "[flags]"} & {*words} else words


def split(words: list[str]) -> tuple[str, list[str]]:
    """The program of a command, as `call` names it, and its arguments."""
    if words[0] == "-m":
        return MODULES[words[1]], words[2:]
    return words[0].removesuffix(".py"), words[1:]


class Parsed(Exception):
    """Raised when a program has parsed its flags, to stop it there."""


def parse(name: str, argv: list[str]) -> str:
    """What a program prints that parses its arguments, and does nothing with them."""
    parse_flags = tyro.cli

    def parse_and_stop(*args, **kwargs):
        parse_flags(*args, **kwargs)
        raise Parsed

    main = program(name).main
    with (
        mock.patch.object(tyro, "cli", parse_and_stop),
        mock.patch.object(sys, "argv", [name, *argv]),
        redirect_stdout(io.StringIO()) as out,
        pytest.raises((Parsed, SystemExit)) as stopped,
    ):
        main(argv) if main.__code__.co_argcount else main()  # a script reads sys.argv
    assert stopped.type is Parsed or stopped.value.code == 0  # --help exits with 0
    return out.getvalue()


@cache
def flags(name: str, *before: str) -> set[str]:
    """All flags in a program's help, or in that of its subcommand `before`."""
    return set(re.findall(r"--[a-z][a-z0-9.-]+", parse(name, [*before, "--help"])))


COMMANDS = dict.fromkeys(shlex.join(words) for path in DOCUMENTS for words in typed(path))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(f"^{target}:", makefile, re.MULTILINE) for target in targets)
        return
    name, argv = split(words)
    assert (ROOT / f"{name}.py").exists()
    if name not in WITHOUT_FLAGS:
        parse(name, argv)


def test_every_flag_in_the_text_exists():
    programs = ["train", "sample", *MODULES.values()]
    names = ("recipes", "ablations", "evaluation", "peers", "prepare")
    scripts = [f"benchmarks/{name}" for name in names]
    known = set.union(OTHERS, *map(flags, programs + scripts))
    for way in ("import", "export"):
        known |= flags(MODULES["gpt.convert"], way)
    known |= flags(MODULES["gpt.data"])
    for path in DOCUMENTS:
        prose = re.sub("https?://\\S+", "", path.read_text(encoding="utf-8"))
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", prose))
        assert mentioned <= known, f"{path.name}: {sorted(mentioned - known)}"


def test_linked_files_exist():
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for pair in re.findall(r"\]\(([^)#\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
            place = "".join(pair)
            assert place.startswith("http") or (path.parent / place).exists(), (path.name, place)


def test_the_file_map_is_complete():
    """Each name in the README's file map exists, and every file and folder of gpt/ is in it."""
    readme = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"^```\n(train\.py .*?)^```", readme, re.DOTALL | re.MULTILINE)
    named = set()
    for line in block.splitlines():
        indent, first, rest = re.match(r"( *)(\S+)(.*)", line).groups()
        folder = Path("gpt") if indent else Path()
        for name in [first.rstrip(","), *re.findall(r"[a-z_]+\.py", rest)]:
            candidates = [ROOT / folder / name, ROOT / folder / first / name]
            assert any(path.exists() for path in candidates), line
            named.add(str(folder / name).rstrip("/"))
    modules = {
        f"gpt/{path.name}"
        for path in (ROOT / "gpt").glob("[a-z]*")
        if path.suffix == ".py" or path.is_dir()
    }
    assert modules <= named, sorted(modules - named)


# Guides, followed with everything made small.

TRAIN = "--steps 2 --batch-size 2 --grad-accum 1 --seq-len 64 --warmup-steps 1 --eval-tokens 99"
TRAIN += " --model.n-layers 1 --model.d-model 16 --model.n-heads 2 --tokenizer byte"
SHRINK = {
    "train": TRAIN.split(),
    "sample": ["--max-new-tokens", "4"],
    "gpt/tour": ["--max-new-tokens", "2"],
    "gpt/bench/__main__": ["--batch-sizes", "1", "--repeats", "2"],
}
NOT_SHRUNK = {"--check", "--compare", "--score"}  # they accept none of these flags
GUIDES = ["README", "docs/training", "docs/sampling", "docs/measuring", "docs/how-it-works"]
GUIDES += ["docs/pretrain-gpt2"]


@pytest.fixture(scope="module")
def workspace(text, tmp_path_factory):
    """A folder as the guides expect it: with a text, and with a run."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "fineweb").mkdir()
    for name in ("my.txt", "fineweb/a.txt"):
        (folder / name).write_bytes(text.read_bytes())
    succeed("train", *SHRINK["train"], "--data", text, "--out", folder / "runs/tiny")
    return folder


def follow(path, workspace, monkeypatch, but=(), shrink=SHRINK, numbers=None):
    """Run the commands of a guide's blocks in order, made small by the flags `shrink` and other
    `numbers`, without those of the programs `but`; returns how many were run."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n"))
    found = [words for words in in_blocks(path) if words[0] != "make"]
    found = [words for words in found if not {*but} & {*words[:2]}]
    for words in found:
        if words[1] == "gpt.bench":
            words = [{"gpt2": "tiny", "128,512": "8"}.get(word, word) for word in words]
        name, argv = split([(numbers or {}).get(word, word) for word in words])
        more = () if NOT_SHRUNK & {*words} else shrink.get(name, ())
        done = call(name, *argv, *more)
        assert done.code == 0, (words, done.err)
    return len(found)


def test_the_readme_can_be_followed(workspace, monkeypatch):
    """Except the benchmark, which takes a minute: the slow test below runs it."""
    assert follow(ROOT / "README.md", workspace, monkeypatch, but=["gpt.bench"]) == 4
    assert (workspace / "runs/mine/loss.png").exists()
    tiny = workspace / "runs/tiny"
    assert (tiny / "report.html").exists() and (tiny / "tour.html").exists()


def test_the_python_of_the_readme_runs(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    readme = (ROOT / "README.md").read_text("utf-8")
    (program,) = re.findall("```python\n(.*?)```", readme, re.DOTALL)
    exec(program.replace("max_new_tokens=100", "max_new_tokens=4"), names := {})
    assert names["logits"].shape == (len("import "), names["model"].config.vocab_size)
    assert capsys.readouterr().out.startswith("def ")


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_can_be_followed(name, workspace, monkeypatch):
    """Two measurements of a busy machine differ, so that none is held to be as fast as another."""
    assert follow(ROOT / f"{name}.md", workspace, monkeypatch, numbers={"5%": "10000%"})


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_guide_to_weights_can_be_followed(sampled, text, tmp_path, monkeypatch):
    """By default without what compiles the sampler, which other tests do with such runs."""
    c = standins.GPT2 | {"vocab_size": 257, "n_layer": 1, "eos_token_id": 256}
    standin_tokenizers.write_bytes(standins.write(tmp_path / "gpt2", c))
    (tmp_path / "my.txt").write_bytes(text.read_bytes())
    few = {"200": "3", "20": "1", "40": "4"}
    but = () if sampled else ["sample.py"]
    path, shrink = ROOT / "docs/weights.md", {"train": ["--sample-every", "0"]}
    assert follow(path, tmp_path, monkeypatch, but, shrink, few) == (7 if sampled else 3)
    theirs, ours = (load_file(name + "/model.safetensors") for name in ("gpt2", "mine"))
    moved = [np.abs(ours[name] - theirs[name]).max() for name in theirs]
    assert 0 < max(moved) < 2e-4, "three steps of 3e-5 from the weights that came in"

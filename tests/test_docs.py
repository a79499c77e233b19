"""README.md and docs/: every command parses, every flag and every linked file exists."""

import io
import re
import shlex
import sys
from pathlib import Path

import documents
import programs
import pytest
from documents import DOCUMENTS, ROOT

# They have positional arguments only; the test just checks that the file exists.
WITHOUT_FLAGS = {"benchmarks/pods", "benchmarks/importing"}
OTHERS = {"--logdir"}  # a flag of tensorboard
TRAIN = "--steps 2 --batch-size 2 --grad-accum 1 --seq-len 64 --warmup-steps 1 --eval-tokens 99"
TRAIN += " --model.n-layers 1 --model.d-model 16 --model.n-heads 2 --tokenizer byte"
BENCH = "--batch-sizes 1 --repeats 2"
SHRINK = {
    "train": TRAIN.split(),
    "sample": ["--max-new-tokens", "4"],
    "gpt/tour": ["--max-new-tokens", "2"],
    "gpt/bench/__main__": BENCH.split(),
}
GUIDES = ["README", *(f"docs/{name}" for name in ("training", "sampling", "measuring"))]
GUIDES += ["docs/how-it-works", "docs/pretrain-gpt2"]
NOT_SHRUNK = {"--check", "--compare", "--score"}  # they accept none of these flags
COMMANDS = dict.fromkeys(shlex.join(words) for path in DOCUMENTS for words in documents.typed(path))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(f"^{target}:", makefile, re.MULTILINE) for target in targets)
        return
    name, _ = documents.split(words)
    assert (ROOT / f"{name}.py").exists()
    if name not in WITHOUT_FLAGS:
        documents.parse(words)


def test_every_flag_in_the_text_exists():
    programs = ["train", "sample", *documents.MODULES.values()]
    scripts = ["benchmarks/recipes", "benchmarks/ablations", "benchmarks/peers"]
    known = set.union(OTHERS, *map(documents.flags, programs + scripts))
    for way in ("import", "export"):
        known |= documents.flags(documents.MODULES["gpt.convert"], way)
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


@pytest.fixture(scope="module")
def workspace(text, tmp_path_factory):
    """A folder as the guides expect it: with a text, and with a run."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "fineweb").mkdir()
    for name in ("my.txt", "fineweb/a.txt"):
        (folder / name).write_bytes(text.read_bytes())
    done = programs.call("train", *SHRINK["train"], "--data", text, "--out", folder / "runs/tiny")
    assert done.code == 0, done.err
    return folder


def follow(path, workspace, monkeypatch, but=()):
    """Run the commands of a guide's blocks in order, made small, without those of the modules
    `but`; returns how many were run."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n"))
    commands = [words for words in documents.in_blocks(path) if words[0] != "make"]
    commands = [words for words in commands if words[1] not in but]
    for words in commands:
        if words[1] == "gpt.bench":
            words = [{"gpt2": "tiny", "128,512": "8"}.get(word, word) for word in words]
        shrink = {} if NOT_SHRUNK & {*words} else SHRINK
        done = documents.run(words, shrink)
        assert done.code == 0, (words, done.err)
    return len(commands)


def test_the_readme_can_be_followed(workspace, monkeypatch):
    """Except the benchmark, which takes a minute: the slow test below runs it."""
    assert follow(ROOT / "README.md", workspace, monkeypatch, but=["gpt.bench"]) == 4
    assert (workspace / "runs/mine/loss.png").exists()
    assert (workspace / "report.html").exists() and (workspace / "tour.html").exists()


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
    assert follow(ROOT / f"{name}.md", workspace, monkeypatch)

"""README.md and docs/: each command is one that the programs take, each link leads somewhere."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import documents
import programs
import pytest

# They read their arguments by place; that the file is there is all that is checked.
WITHOUT_FLAGS = {"benchmarks/pods", "benchmarks/importing"}
OTHERS = {"--logdir"}  # of tensorboard
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
NOT_SHRUNK = {"--check", "--compare", "--score"}  # they take none of these
COMMANDS = [
    pytest.param(words, id=f"{path.stem} {' '.join(words)[:60]}")
    for path in documents.DOCUMENTS
    for words in documents.typed(path)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_one_that_its_program_takes(words):
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (documents.ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(f"^{target}:", makefile, re.MULTILINE) for target in targets)
        return
    name, _ = documents.split(words)
    assert (documents.ROOT / f"{name}.py").exists()
    if name not in WITHOUT_FLAGS:
        documents.parse(words)


def test_each_flag_that_is_spoken_of_exists():
    programs = ["train", "sample", *documents.MODULES.values()]
    scripts = ["benchmarks/recipes", "benchmarks/ablations", "benchmarks/peers"]
    known = set.union(OTHERS, *map(documents.flags, programs + scripts))
    for way in ("import", "export"):
        known |= documents.flags(documents.MODULES["gpt.convert"], way)
    for path in documents.DOCUMENTS:
        prose = re.sub("https?://\\S+", "", path.read_text(encoding="utf-8"))
        spoken = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", prose))
        assert spoken <= known, f"{path.name}: {sorted(spoken - known)}"


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=lambda path: path.stem)
def test_links_and_pictures_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for place in re.findall(r"\]\(([^)#\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        place = "".join(place)
        if not place.startswith("http"):
            assert (path.parent / place).exists(), place


def test_the_file_map_is_true():
    """Each name in it exists, and each room and each file at the top is named."""
    (block,) = re.findall(
        r"^```\n(train\.py .*?)^```", (documents.ROOT / "README.md").read_text("utf-8"), re.S | re.M
    )
    folder, named = Path(), set()
    for line in block.splitlines():
        indent, first, rest = re.match(r"( *)(\S+)(.*)", line).groups()
        folder = Path("gpt") if indent else Path()
        names = [first.rstrip(","), *re.findall(r"[a-z_]+\.py", rest)]
        for name in names:
            places = [documents.ROOT / folder / name, documents.ROOT / folder / first / name]
            assert any(place.exists() for place in places), line
            named.add(str(folder / name).rstrip("/"))
    rooms = {f"gpt/{path.name}" for path in (documents.ROOT / "gpt").glob("[a-z]*[!_]")}
    rooms = {room for room in rooms if (documents.ROOT / room).is_dir() or room.endswith(".py")}
    left = {room for room in rooms if room not in named and room != "gpt/py.typed"}
    assert not left, left


@pytest.fixture(scope="module")
def desk(text, tmp_path_factory):
    """A folder in which a reader of the guides could stand: a text, a run."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "fineweb").mkdir()
    for name in ("my.txt", "fineweb/a.txt"):
        (folder / name).write_bytes(text.read_bytes())
    done = programs.call("train", *SHRINK["train"], "--data", text, "--out", folder / "runs/tiny")
    assert done.code == 0, done.err
    return folder


def follow(path, desk, monkeypatch, skipped=lambda words: False):
    """Give the commands of a guide's blocks in order, made small; how many there were."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n"))
    commands = [words for words in documents.in_blocks(path) if words[0] != "make"]
    for words in commands:
        if not skipped(words):
            if words[1] == "gpt.bench":
                words = [{"gpt2": "tiny", "128,512": "8"}.get(word, word) for word in words]
            small = {} if NOT_SHRUNK & {*words} else SHRINK
            done = documents.run(words, small)
            assert done.code == 0, (words, done.err)
    return len(commands)


def test_the_readme_can_be_followed(desk, monkeypatch):
    bench = lambda words: words[1:2] == ["gpt.bench"]  # noqa: E731 - a minute; below
    assert follow(documents.ROOT / "README.md", desk, monkeypatch, skipped=bench) == 5
    assert (desk / "runs/mine/loss.png").exists()
    assert (desk / "report.html").exists() and (desk / "tour.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_can_be_followed(name, desk, monkeypatch):
    assert follow(documents.ROOT / f"{name}.md", desk, monkeypatch)


@pytest.mark.slow
def test_the_guide_to_many_devices_can_be_followed_on_virtual_ones(text, tmp_path):
    """In processes of eight. What needs other machines is tried in test_processes.py, what needs
    a TPU's compiler in pod/test_topology.py."""
    small = [*SHRINK["train"], "--batch-size", "64", "--model.d-model", "64", "--model.n-heads"]
    read = ["--data", text, "--overwrite"]
    eight = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    commands = documents.typed(documents.ROOT / "docs/parallelism.md")
    elsewhere = {"--coordinator", "--topology", "benchmarks/pods.py"}
    tried = [words for words in commands if not elsewhere & {*words}]
    for program, *words in tried:
        argv = [{"RUN": "runs/gpt2"}.get(word, word) for word in words]
        if program == "train.py":
            argv += [*small, "4", *([] if "--dry-run" in words else read)]
        done = subprocess.run(
            [sys.executable, documents.ROOT / program, *map(str, argv)],
            cwd=tmp_path, env=os.environ | {"XLA_FLAGS": eight}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stderr)
    assert len(tried) == 5 and (tmp_path / "runs/gpt2-xl/loss.png").exists()

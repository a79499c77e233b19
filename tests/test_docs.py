"""README.md and docs/: each command is one that the programs take, each link leads somewhere."""

import re
from pathlib import Path

import documents
import pytest

# They read their arguments by place; that the file is there is all that is checked.
WITHOUT_FLAGS = {"benchmarks/pods", "benchmarks/importing"}
OTHERS = {"--logdir"}  # of tensorboard
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
        names = [first.rstrip(",")] + re.findall(r"[a-z_]+\.py", rest)
        for name in names:
            places = [documents.ROOT / folder / name, documents.ROOT / folder / first / name]
            assert any(place.exists() for place in places), line
            named.add(str(folder / name).rstrip("/"))
    rooms = {f"gpt/{path.name}" for path in (documents.ROOT / "gpt").glob("[a-z]*[!_]")}
    rooms = {room for room in rooms if (documents.ROOT / room).is_dir() or room.endswith(".py")}
    left = {room for room in rooms if room not in named and room != "gpt/py.typed"}
    assert not left, left

"""Our tokenizers against `tokenizers`: the same ids for any text, special tokens in it or not."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt.convert import tokenizers_in, tokenizers_out
from gpt.data import tokenizers as tokenizers_of_ours
from gpt.errors import UserError

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tokenizers import AddedToken, Regex, decoders, models, normalizers, trainers  # noqa: E402
from tokenizers import pre_tokenizers as cuts  # noqa: E402

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
END, PAD, THINK = "<|endoftext|>", "<|pad|>", "<think>"


def split(pattern):
    return cuts.Sequence(
        [cuts.Split(Regex(pattern), "isolated"), cuts.ByteLevel(False, use_regex=False)]
    )


FORMS = {  # how each family cuts text, and what it does before
    "gpt2": (cuts.ByteLevel(add_prefix_space=False), None),
    "llama 3": (split(LLAMA3), None),
    "smollm2": (cuts.Sequence([cuts.Digits(True), cuts.ByteLevel(False)]), None),
    "qwen": (split(QWEN), normalizers.NFC()),
}


def corpus():
    """The text of this repository's tests, Chinese, emoji and numbers."""
    files = sorted(Path(__file__).parent.parent.rglob("*.py"))[:30]
    more = "今天的天气很好，我们去公园。🙂🙂 👩‍👩‍👧 don't we'll 1234567 \t\t\n\n  café naïve\r\n"
    return [path.read_text("utf-8") for path in files] + [more * 50]


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    """A tokenizer of theirs, trained, and ours that was read from its file."""
    cut, form = FORMS[request.param]
    theirs = tokenizers.Tokenizer(models.BPE(ignore_merges=request.param == "llama 3"))
    theirs.pre_tokenizer, theirs.decoder = cut, decoders.ByteLevel()
    if form:
        theirs.normalizer = form
    first = [END, PAD] if request.param == "smollm2" else []
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=cuts.ByteLevel.alphabet(),
        special_tokens=first,
        show_progress=False,
    )
    theirs.train_from_iterator(corpus(), trainer)
    theirs.add_special_tokens([END, PAD])
    theirs.add_tokens([AddedToken(THINK, normalized=False)])
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "eos_token_id": theirs.token_to_id(END)}
    return theirs, tokenizers_in.read(folder, config, 1600, False, str), folder


PIECES = [
    "the ",
    "'LL",
    "'s",
    " 1234",
    "今天",
    "🙂",
    "\u200d",
    "é",
    "\n\n",
    "   ",
    "\t",
    "\0",
    "\r\n",
]
PIECES += [
    END,
    PAD,
    THINK,
    "<|",
    "|>",
    "def f(x):\n    ",
    "\u00a0",
    "\u3000",
    "ſ",
    "İ",
    "ﬃ",
    "½",
    "٣",
]
WILD = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs", "Cn"])))
).map("".join)


def test_the_same_ids_for_any_text(pair):
    theirs, ours, _ = pair

    @given(WILD)
    @example("e\u0301" + END + "\u0338 x")
    @example("a  1  b   \n 22")
    def check(text):
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids

    check()


def test_the_same_ids_where_bytes_have_no_token(tmp_path):
    """As in SmolLM2: theirs leaves such bytes out, ours refuses the text."""
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = FORMS["smollm2"][0], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[END], show_progress=False)
    theirs.train_from_iterator(corpus(), trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    config = {"model_type": "llama", "eos_token_id": 0}
    ours = tokenizers_in.read(tmp_path, config, 1000, False, str)
    (tmp_path / "out").mkdir()
    tokenizers_out.write(ours, tmp_path / "out", 64)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back.get_vocab() == theirs.get_vocab()

    @given(WILD)
    def check(text):
        try:
            ids = ours.encode(text, allowed_special="all")
        except UserError:
            assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=False) != text
            return
        assert ids == theirs.encode(text).ids == back.encode(text, add_special_tokens=False)

    check()


def test_the_same_ids_where_special_tokens_are_text(pair):
    theirs, ours, _ = pair
    theirs.encode_special_tokens = True

    @given(WILD)
    def check(text):
        text = text.replace(THINK, "")  # no special one: they find it even so
        assert ours.encode_ordinary(text) == theirs.encode(text).ids

    check()
    theirs.encode_special_tokens = False


def test_real_text_and_what_ids_spell(pair):
    theirs, ours, _ = pair
    for text in corpus():
        ids = ours.encode_ordinary(text.replace(END, "").replace(THINK, "").replace(PAD, ""))
        assert ids == theirs.encode(ours.decode(ids)).ids
    rng = random.Random(0)
    for _ in range(200):
        ids = rng.choices(range(theirs.get_vocab_size()), k=20)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_what_we_write_gives_the_same_ids(pair, tmp_path):
    _, ours, _ = pair
    tokenizers_out.write(ours, tmp_path, 64)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path)

    @given(WILD)
    def check(text):
        text = text.replace(THINK, "")
        assert back(text)["input_ids"] == ours.encode(text, allowed_special="all")

    check()


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_our_own_tokenizers_there(name, tmp_path):
    ours = tokenizers_of_ours.create(name, corpus, 900)
    tokenizers_out.write(ours, tmp_path, 64)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path)

    @given(WILD)
    def check(text):
        assert back(text)["input_ids"] == ours.encode(text, allowed_special="all")
        assert back.decode(ours.encode_ordinary(text)) == text

    check()
    assert back.eos_token_id == ours.eot_token and len(back) == ours.n_vocab


def test_characters_there(tmp_path):
    ours = tokenizers_of_ours.create("char", lambda: ["the cat 今天\n"], 0)
    tokenizers_out.write(ours, tmp_path, 64)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path)

    @given(st.text(st.sampled_from(ours.characters)))
    def check(text):
        assert back(text)["input_ids"] == ours.encode_ordinary(text)
        assert back.decode(ours.encode_ordinary(text)) == text

    check()


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """OpenAI's gpt2, where GPT2_VOCABULARY names a folder that has it as tiktoken keeps it."""
    kept = os.environ.get("GPT2_VOCABULARY")
    if not kept:
        pytest.skip("GPT2_VOCABULARY names no folder with the gpt2 vocabulary")
    cache = shutil.copytree(kept, tmp_path / "cache")  # tiktoken deletes what it dislikes
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return tokenizers_of_ours.create("gpt2", lambda: (), 0)


def test_gpt2_out_and_in(gpt2, tmp_path):
    """tiktoken's own gpt2, as vocab.json and merges.txt and as tokenizer.json, to the last id."""
    out = tmp_path / "out"
    out.mkdir()
    tokenizers_out.write(gpt2, out, 1024)
    values = json.loads((out / "tokenizer.json").read_text("utf-8"))
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(values["model"]["vocab"] | {END: 50256}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in values["model"]["merges"])]
    (old / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    config = {"model_type": "gpt2", "eos_token_id": 50256}
    read = [tokenizers_in.read(folder, config, 50257, False, str) for folder in (out, old)]
    there = transformers.AutoTokenizer.from_pretrained(out)

    @given(WILD)
    def check(text):
        ids = gpt2.encode(text, allowed_special="all")
        assert all(one.encode(text, allowed_special="all") == ids for one in read)
        assert there(text)["input_ids"] == ids

    check()
    assert all(one.n_vocab == 50257 and one.eot_token == 50256 for one in read)

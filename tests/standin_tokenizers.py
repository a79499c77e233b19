"""Tokenizers of the forms that models come with, each trained on a small text by the `tokenizers`
library itself, with the steps and options that the models' own tokenizer.json have."""

import functools
import json
from unittest import mock

from tiktoken_ext import openai_public
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as cut
from tokenizers.trainers import BpeTrainer, UnigramTrainer

from gpt.data import tokenizers as ours

END = "<|endoftext|>"
N_VOCAB = 700  # the model's ids: more than any of these tokenizers has
TEXT = [
    "The cat sat on the mat, the dog ran over the hill; don't we'll they're 1234567 2026-11-27",
    "今天的天气很好，我们去公园。今天的天气很好！ café naïve Straße ñandú 🙂🙂 👩‍👩‍👧",
    "def f(x):\n    return x + 123\n\n\n        if x == 1:\r\n\t\tprint('x')   # " + "=" * 8,
] * 8
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
# Texts that a tokenizer may stumble over, special tokens among them.
WILD = [
    *TEXT[:3],
    "",
    " ",
    "  leading, and trailing  ",
    "\n\n \n\t\r\n",
    "a  1  b   \n 22 333 4444",
    f"a{END}b</s><s>[INST]<bos><|im_start|>user\n<think>x</think><unk><0x41>",
    "▁ ▁▁ Ġ Ċ ĠĠ <0x0A>",
    "e\u0301 é ﬃ ½ ٣ \u0130 \u017f \u00a0\u3000\u200d\u2028 \x00\x01\x7f",
    "\U0001f469\u200d\U0001f52c \U00010ffff \U000e0041 \ufffd \ufeff",
    "מה שלומך العربية हिन्दी ไทย 한국어 日本語",
    "'LL 'Re ''s don't WE'VE I'M",
    "x" * 300 + "\n" * 40 + " " * 70 + "!",
]


def openai_encoding(name, tokens):
    """One of OpenAI's encodings with these tokens in place of a download, and two unused ids."""
    ranks = {token: i for i, token in enumerate(tokens)}
    special = {END: len(tokens) + 1, "<|endofprompt|>": len(tokens) + 3}
    with (
        mock.patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks),
        mock.patch.object(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **_: ranks),
    ):
        parts = openai_public.ENCODING_CONSTRUCTORS[name]() | {"special_tokens": special}
    with mock.patch.dict(openai_public.ENCODING_CONSTRUCTORS, {name: lambda: parts}):
        return ours.create(name, lambda: (), 0)


def split(pattern):
    level = cut.ByteLevel(add_prefix_space=False, use_regex=False)
    return cut.Sequence([cut.Split(Regex(pattern), "isolated"), level])


def byte_level(cutting, special, normalizer=None, **options):
    """A byte-level BPE; its special tokens have the last ids."""
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer, made.decoder = cutting, decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if normalizer:
        made.normalizer = normalizer
    alphabet = cut.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    made.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return made


def llama3():
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    made = byte_level(split(LLAMA3), special, ignore_merges=True)
    begin = made.token_to_id(special[0])
    made.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], begin)]
    )
    return made


def qwen():
    made = byte_level(split(QWEN), [END, "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    made.add_tokens([AddedToken("<think>", normalized=False)])  # not a special one
    return made


def tinyllama():
    """Llama 2's form: a BPE of characters with a token for each byte, as SentencePiece makes it; a
    ▁ before the text, no cutting, one space stripped when decoding."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    trainer = BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXT[:1] * 8, trainer)  # other scripts have only bytes
    # The trainer marks the byte tokens as special; in these models they are ordinary.
    whole = json.loads(made.to_str())
    added = [token for token in whole["added_tokens"] if token["content"] not in BYTE_TOKENS]
    return Tokenizer.from_str(json.dumps(whole | {"added_tokens": added}))


def unigram():
    """SentencePiece's other model, with Metaspace."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = cut.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


FORMS = {
    "GPT-2": lambda: byte_level(cut.ByteLevel(add_prefix_space=False), [END]),
    "Llama 3": llama3,
    "Qwen": qwen,
    "TinyLlama": tinyllama,
    "Unigram": unigram,
}


@functools.cache
def make(form: str) -> bytes:
    """The tokenizer.json of a form."""
    return FORMS[form]().to_str(pretty=True).encode()


def write_bytes(folder):
    """Write a tokenizer.json of 256 bytes and an end of text, without merges."""
    vocab = {character: i for i, character in enumerate(sorted(cut.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocab | {END: 256}, merges=[]))
    made.pre_tokenizer, made.decoder = cut.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([END])
    made.save(str(folder / "tokenizer.json"))
    return folder

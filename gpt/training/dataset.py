"""The text and the tokenizer of a run, from what was asked for. Knows neither steps nor weights."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from gpt.config import Dtype, TrainConfig, to_json
from gpt.data import corpus, token_files, tokenizers
from gpt.errors import require
from gpt.training import metrics, resume, run_dir


def prepare(
    config: TrainConfig,
    paths: tuple[Path, ...],
    about: dict[str, Any] | None,
    cache: Path | None,
    console: Console,
) -> tuple[tokenizers.Tokenizer, token_files.Dataset]:
    """The tokenizer, that of the earlier run in `about` if there is one, and the text as tokens.

    `paths`: text or prepared tokens (none: Python's standard library). Tokens are kept in `cache`
    for the next run; without one nothing is left behind. UserError for what cannot be used.
    """
    prepared = any(token_files.is_prepared(path) for path in paths)
    require(
        not prepared or len(paths) == 1,
        "--data holds prepared tokens beside other paths: they stand alone, since text cannot be "
        "added to them",
    )
    if prepared:
        tokenizer = tokenizer_of_tokens(config, paths[0], about)
        return tokenizer, token_files.open_prepared(paths[0], tokenizer)
    text = read_text(paths, console)
    if about:
        tokenizer = tokenizers.from_json(about["tokenizer"])
    else:
        tokenizer = tokenizers.create(config.tokenizer, text.documents, config.vocab_size)
    if about and "data" in about:  # here, before a tokenizer meets what it was not made for
        resume.require_same_text(about, token_files.fingerprint_of(text, tokenizer))
    kept = contextlib.nullcontext(cache) if cache else tempfile.TemporaryDirectory()
    with kept as folder, metrics.tokenizing(console) as report:
        name = f".{token_files.fingerprint_of(text, tokenizer)[:32]}.lock"
        with run_dir.wait_for(Path(folder) / name):  # of several processes one makes the tokens
            return tokenizer, token_files.tokenize(text, tokenizer, Path(folder), report)


def tokenizer_of_tokens(
    config: TrainConfig, folder: Path, about: dict[str, Any] | None
) -> tokenizers.Tokenizer:
    """The tokenizer of prepared tokens: the earlier run's, the one beside them, or one by name."""
    if about:
        return tokenizers.from_json(about["tokenizer"])
    if (folder / "tokenizer.json").exists():
        return tokenizers.load(folder / "tokenizer.json")
    require(
        config.tokenizer != "bpe",
        "--data has no tokenizer beside its tokens, and none can be trained on them: name the "
        "one that made them with --tokenizer",
    )
    return tokenizers.create(config.tokenizer, lambda: (), config.vocab_size)


def read_text(paths: tuple[Path, ...], console: Console) -> corpus.Corpus:
    """The text of `paths`, described on the console."""
    text = corpus.read_corpus(paths) if paths else corpus.standard_library()
    console.print(
        f"text           {text.description}, {text.n_documents:,} document(s), "
        f"fingerprint {text.fingerprint[:12]}" + ("" if paths else "; for your own: --data PATH")
    )
    if text.skipped:
        names = ", ".join(text.skipped[:5]) + (", ..." if len(text.skipped) > 5 else "")
        console.print(f"skipped        {len(text.skipped):,} file(s), not text: {names}")
    return text


def settle(config: TrainConfig, tokenizer, dtype: Dtype) -> TrainConfig:
    """The config with what the tokenizer and the machine decide: vocabulary, and types left open.

    `dtype`: the type to compute in where the config names none.
    """
    dtype = config.dtype or dtype
    model = dataclasses.replace(config.model, vocab_size=tokenizer.n_vocab)
    return dataclasses.replace(config, model=model.computing_in(dtype), dtype=dtype)


def describe_run(command, config: TrainConfig, tokenizer, dataset) -> dict[str, Any]:
    """All that a checkpoint says beside its arrays: it needs nothing else to be used.

    Types that `command` left open stay open: another machine fills them its way. The paths are
    those that were typed, for who wants to type the command again.
    """
    model = dataclasses.replace(command.train.model, vocab_size=config.model.vocab_size)
    return {
        "model": to_json(model),
        "train": to_json(config),
        "tokenizer": tokenizers.to_json(tokenizer),
        "data": {"fingerprint": dataset.fingerprint, "paths": [str(p) for p in command.data or ()]},
        "init_from": str(command.init_from) if command.init_from else None,
    }

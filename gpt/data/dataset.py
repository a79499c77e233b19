"""The text of a run as tokens: from what the user asked for to a tokenizer and a dataset."""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from gpt.data import corpus, token_files, tokenizers
from gpt.errors import require


def load_dataset(  # noqa: PLR0913 - each is one decision of the user
    paths: Sequence[Path],
    tokenizer: str,
    vocab_size: int,
    *,
    saved_tokenizer: dict | None,
    expected_fingerprint: str | None,
    cache_dir: Path | None,
    log: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
):
    prepared = any(token_files.is_prepared(path) for path in paths)
    require(
        not prepared or len(paths) == 1,
        "--data holds prepared tokens beside other paths: they stand alone, since text cannot be "
        "added to them",
    )
    if prepared:
        folder = paths[0]
        if saved_tokenizer:
            made = tokenizers.from_json(saved_tokenizer)
        elif (folder / "tokenizer.json").exists():
            made = tokenizers.load(folder / "tokenizer.json")
        else:
            require(
                tokenizer != "bpe",
                "--data has no tokenizer beside its tokens, and none can be trained on them: name "
                "the one that made them with --tokenizer",
            )
            made = tokenizers.create(tokenizer, lambda: (), vocab_size)
        dataset = token_files.open_prepared(folder, made)
        require_same(expected_fingerprint, dataset.fingerprint)
        return made, dataset
    text = corpus.read_corpus(paths) if paths else corpus.standard_library()
    log(
        f"text           {text.description}, {text.n_documents:,} document(s), "
        f"fingerprint {text.fingerprint[:12]}" + ("" if paths else "; for your own: --data PATH")
    )
    if text.skipped:
        names = ", ".join(text.skipped[:5]) + (", ..." if len(text.skipped) > 5 else "")
        log(f"skipped        {len(text.skipped):,} file(s), not text: {names}")
    if saved_tokenizer:
        made = tokenizers.from_json(saved_tokenizer)
    else:
        made = tokenizers.create(tokenizer, text.documents, vocab_size)
    fingerprint = token_files.fingerprint_of(text, made)
    require_same(expected_fingerprint, fingerprint)
    kept = contextlib.nullcontext(cache_dir) if cache_dir else tempfile.TemporaryDirectory()
    with kept as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(folder) / f".{fingerprint[:32]}.lock"):
            return made, token_files.tokenize(text, made, Path(folder), progress)


def require_same(expected: str | None, fingerprint: str) -> None:
    require(
        expected in (None, fingerprint),
        "data: the run was trained on other text, or the text has changed; give the same "
        "--data to continue it, another --out, or --overwrite to start afresh",
    )

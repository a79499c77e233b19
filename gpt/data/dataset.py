"""From what the user asked for to a tokenizer and a dataset: text or prepared tokens."""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gpt.data import token_files, tokenizers
from gpt.data.corpus import read_corpus, standard_library
from gpt.data.token_files import Dataset
from gpt.data.tokenizers import Tokenizer
from gpt.errors import require

MAX_NAMES = 5  # of skipped files that are listed


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
) -> tuple[Tokenizer, Dataset]:
    """The tokenizer and the tokens of `paths`, or of Python's standard library if there are none.

    paths: files and folders of text, or alone a folder of prepared tokens.
    tokenizer, vocab_size: as of `tokenizers.create`, for a run that has no tokenizer yet.
    saved_tokenizer: the tokenizer of an earlier run as JSON, which is used instead.
    expected_fingerprint: the dataset's fingerprint when a run is resumed.
    cache_dir: where tokens are kept; None leaves nothing behind.
    progress: called now and then with the bytes of text tokenized and those in all.

    Raises UserError for text or tokens that cannot be read, and if they are not those expected.
    """

    def choose_tokenizer(documents: Callable[[], Iterable[str]]) -> Tokenizer:
        if saved_tokenizer:
            return tokenizers.from_json(saved_tokenizer)
        return tokenizers.create(tokenizer, documents, vocab_size)

    # Tokens that were prepared before come with their tokenizer, unless they are nanoGPT's.
    if any(token_files.is_prepared(path) for path in paths):
        require(
            len(paths) == 1,
            "--data names prepared tokens beside other paths: text cannot be added to them, "
            "so name them alone",
        )
        (folder,) = paths
        beside = folder / "tokenizer.json"
        if beside.exists() and not saved_tokenizer:
            chosen = tokenizers.load(beside)
        else:
            require(
                tokenizer not in ("bpe", "char") or bool(saved_tokenizer),
                f"--data has no tokenizer beside its tokens, and a {tokenizer} tokenizer cannot be "
                "trained on tokens: name the one that made them with --tokenizer",
            )
            chosen = choose_tokenizer(lambda: ())
        is_ours = (folder / token_files.HEADER).is_file()
        open_tokens = token_files.open_shards if is_ours else token_files.open_headerless
        dataset = open_tokens(folder, chosen)
        require_same(expected_fingerprint, dataset.fingerprint)
        return chosen, dataset

    text = read_corpus(paths) if paths else standard_library()
    hint = "" if paths else "; for your own: --data PATH"
    log(
        f"text           {text.description}, {text.n_documents:,} document(s), "
        f"fingerprint {text.fingerprint[:12]}{hint}"
    )
    if text.skipped:
        count = len(text.skipped)
        files = "1 file that is" if count == 1 else f"{count:,} files that are"
        more = ", ..." if count > MAX_NAMES else ""
        log(f"skipped        {files} not text: {', '.join(text.skipped[:MAX_NAMES])}{more}")
    chosen = choose_tokenizer(text.documents)

    # Text that has changed is refused before it is tokenized, which may take minutes.
    fingerprint = token_files.fingerprint_of(text, chosen)
    require_same(expected_fingerprint, fingerprint)

    # On POSIX the tokens stay readable after their files are gone: they are mapped into memory.
    kept = contextlib.nullcontext(cache_dir) if cache_dir else tempfile.TemporaryDirectory()
    with kept as folder:
        return chosen, token_files.tokenize(text, chosen, Path(folder), progress)


def require_same(expected: str | None, fingerprint: str) -> None:
    """Raise UserError if a resumed run would go on with other text."""
    require(
        expected in (None, fingerprint),
        "data: the run was trained on other text, or the text has changed; give the same "
        "--data to continue it, another --out, or --overwrite to start afresh",
    )

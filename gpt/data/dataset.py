"""Load the tokenizer and the dataset the user asked for, from text in any format or from tokens.

A text's tokens are kept in a folder named after their fingerprint, which depends on the files'
contents. Files whose names, sizes and times match those of an earlier run are not read again
(token_store.py).
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.data import prepare, token_files, tokenizers
from gpt.data.batches import BLOCK
from gpt.data.formats import PIECE, BadDocuments, read_pieces
from gpt.data.options import DataOptions, Reading
from gpt.data.sources import Source, expand, find, open_text, standard_library
from gpt.data.token_files import VERSION, Dataset, Mixture, Tokens
from gpt.data.token_store import TokenStore
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError, require

MOST_NAMES = 10_000  # file names kept in a checkpoint, to tell which file has changed
LEARNED = ("bpe", "char")  # tokenizers that are trained on the text
SMALL = 2**26  # bytes of files; for a plan, a larger text's tokens are only estimated
SAMPLED_FILES = 4  # of each format, for an estimate
SAMPLED_TEXT = 2**25  # characters of each of these files

Log = Callable[[str], None]


@dataclass(eq=False)
class Origin:
    """One source of data: text, a folder of our tokens, or files of other projects' tokens.

    weight: its share of the batches; None for the only source. held_out: as in `prepare.Job`.
    folder: where our tokens are, once known. files: each file's digest by name. splits: the
    tokens, once open.
    """

    weight: float | None
    held_out: float | None
    text: Source | None = None
    folder: Path | None = None
    shards: list[Path] = field(default_factory=list)
    fingerprint: str = ""
    files: dict[str, str] = field(default_factory=dict)
    splits: dict[str, Tokens] = field(default_factory=dict)

    def start_key(self, tokenizer: Tokenizer, options: Reading) -> list:
        """A key that changes whenever a text's tokens do, known without reading the text."""
        settings = prepare.token_settings(tokenizer, options, self.held_out)
        return [*settings, [file.stat for file in self.text.files]]


def load_dataset(  # noqa: PLR0913 - each is one decision of the user
    paths: Sequence[Path],
    tokenizer: str,
    vocab_size: int,
    options: DataOptions,
    *,
    store: Path,
    log: Log,
    saved_tokenizer: dict | None = None,
    expected: dict[str, Any] | None = None,
    keep: bool = True,
    estimate: bool = False,
    progress: prepare.Progress = lambda done, total: None,
) -> tuple[Tokenizer, Dataset]:
    """The tokenizer and the tokens of `paths`, or of Python's standard library if there are none.

    paths: files, folders and patterns of text or tokens; several sources as PATH=WEIGHT.
    tokenizer, vocab_size: as for `tokenizers.create`, for a run without a tokenizer.
    store: the folder for tokens, unless `options` names one. keep: store new tokens there.
    saved_tokenizer: an earlier run's tokenizer as JSON, to use instead.
    expected: `fingerprint` and `files` of a resumed run's data.
    estimate: only estimate the token count of a large text that has no tokens yet.

    Raises UserError for text or tokens that cannot be read or that differ from `expected`.
    """
    origins = find_origins(paths, options)
    with TokenStore(options.tokens or store, keep) as kept:
        texts = [origin for origin in origins if origin.text]
        is_sample = estimate and sum(origin.text.size for origin in texts) > SMALL
        if saved_tokenizer:
            chosen = tokenizers.from_json(saved_tokenizer)
        else:
            chosen = choose_tokenizer(origins, tokenizer, vocab_size, options, kept, is_sample)

        for origin in texts:
            origin.folder = kept.recall_folder(origin.start_key(chosen, options))
        if is_sample and not all(origin.folder for origin in texts):
            return chosen, estimate_tokens([origin.text for origin in texts], chosen, options, log)

        # Identify all origins first, so that changed text is refused before it is tokenized.
        for origin in origins:
            identify(origin, chosen, options, log)
        fingerprint = origins[0].fingerprint
        if len(origins) > 1:
            weights = [origin.weight for origin in origins]
            fingerprint = tokenizers.sha256_of([weights, [one.fingerprint for one in origins]])
        files = {name: digest[:16] for one in origins for name, digest in one.files.items()}
        if len(files) > MOST_NAMES:
            files = {}
        require_same(expected, fingerprint, files)

        # Make the missing tokens, and open all.
        for origin in origins:
            if origin.text and not origin.folder:
                origin.folder = kept.folder(origin.fingerprint)
                kept.remove_leftovers(but=origin.folder)
                text = open_text(origin.text, options)
                job = prepare.Job(text, chosen, options, origin.held_out, progress=progress)
                prepare.tokenize(job, origin.folder, origin.fingerprint, origin.files)
                kept.remember(origin.start_key(chosen, options), origin.folder.name)
            if origin.folder:
                origin.splits = token_files.open_shards(origin.folder, chosen, options.verify_data)
                is_kept = keep or origin.folder.parent != kept.new
                log(token_files.describe(origin.folder, is_kept))

    train, val = combine(origins, options, log)
    return chosen, Dataset(train, val, fingerprint, files)


def combine(
    origins: list[Origin], options: DataOptions, log: Log
) -> tuple[Tokens | Mixture, Tokens]:
    """The training and validation tokens of all origins."""
    splits = [origin.splits for origin in origins]
    if options.val_data:
        *splits, last = splits
        val = [last.get("val") or last["train"]]
    else:
        val = [one["val"] for one in splits if "val" in one]
    require(bool(val), "the data has no tokens for validation: give --val-data")
    shards = [shard for tokens in val for shard in tokens.shards]
    held_out = Tokens(shards, sum(tokens.n_bytes for tokens in val))

    train = [one["train"] for one in splits]
    weights = [origin.weight for origin in origins if origin.weight]
    if not weights:
        return train[0], held_out
    shares = [
        f"{weight:.1%} from {len(tokens):,} tokens"
        for weight, tokens in zip(weights, train, strict=True)
    ]
    log(f"mixture        by sequences: {', '.join(shares)}")
    return Mixture(train, weights), held_out


def find_origins(paths: Sequence[Path], options: DataOptions) -> list[Origin]:
    """The sources that --data and --val-data name; UserError if one does not exist."""
    weighted = [split_weight(path) for path in paths]
    weights = [weight for _, weight in weighted]
    require(
        all(weights) or not any(weights),
        "--data gives only some of its paths a weight: give one to each, as in --data A=0.7 B=0.3",
    )
    too_small = [path for path, weight in weighted if weight and weight / sum(weights) < 1 / BLOCK]
    require(not too_small, f"--data {too_small}: its weight is less than a thousandth of the total")
    held_out = 0.0 if options.val_data else options.val_fraction
    if any(weights):
        groups = [([path], weight / sum(weights), held_out) for path, weight in weighted]
    else:
        groups = [([path for path, _ in weighted], None, held_out)]
    if options.val_data:
        groups.append((list(options.val_data), None, 1.0))

    origins = []
    for group, weight, share in groups:
        shards = token_files.find_shards(expand(group))
        prepared = [path for path in group if token_files.is_prepared(path)]
        require(
            len(group) == 1 or not prepared,
            "--data mixes prepared tokens with other paths: give each a weight, as in "
            "--data A=0.7 B=0.3, or name one alone",
        )
        if prepared:
            origins.append(Origin(weight, share, folder=prepared[0]))
        elif shards:
            origins.append(Origin(weight, share, shards=shards))
        else:
            text = find(group) if group else standard_library()
            origins.append(Origin(weight, share, text=text))
    return origins


def split_weight(path: Path) -> tuple[Path, float | None]:
    """A path and its weight, if it has one, as in `web=0.7`."""
    name, _, weight = str(path).rpartition("=")
    with contextlib.suppress(ValueError):
        if name and not path.exists() and float(weight) > 0:
            return Path(name), float(weight)
    return path, None


def choose_tokenizer(
    origins: list[Origin],
    name: str,
    vocab_size: int,
    options: Reading,
    kept: TokenStore,
    is_sample: bool,
) -> Tokenizer:
    """A new run's tokenizer: the one in a folder of our tokens, or the one called `name`.

    is_sample: train it on a sample of the text, and do not keep it.
    """
    folders = [origin.folder for origin in origins if origin.folder]
    if folders:
        return tokenizers.load(folders[0] / "tokenizer.json")
    if name not in LEARNED:
        return tokenizers.create(name, lambda: (), vocab_size)

    texts = [origin.text for origin in origins if origin.text and origin.held_out != 1]
    require(
        bool(texts),
        f"--data has tokens without a tokenizer, and a {name} tokenizer cannot be trained on "
        "tokens: name the one that made them with --tokenizer, or give the text they were made "
        "from (a meta.pkl is not opened, since a pickle can run any program)",
    )
    stats = [file.stat for text in texts for file in text.files]
    key = [VERSION, name, vocab_size, options.document_settings, stats]
    known = kept.recall(key)
    if known:
        return tokenizers.load(known)

    def documents() -> Iterator[str]:
        for text in texts:
            opened = open_text(text, options)
            if is_sample:
                yield from sample(opened, options)[0]
            else:
                yield from (piece for piece, _ in opened.pieces(options))

    chosen = tokenizers.create(name, documents, vocab_size)
    if not is_sample:
        kept.remember(key, json.dumps(tokenizers.to_json(chosen)))
    return chosen


def identify(origin: Origin, tokenizer: Tokenizer, options: DataOptions, log: Log) -> None:
    """Fill in an origin's fingerprint and files; a text is only read if its tokens are not in a
    known folder, or to verify it."""
    if origin.shards:
        origin.splits, origin.fingerprint = token_files.open_others(
            origin.shards, tokenizer, origin.held_out, options.verify_data
        )
        return
    notes = []
    if origin.text and options.verify_data:
        origin.folder = None
    if origin.folder:
        header = token_files.read_header(origin.folder)
        origin.fingerprint = header["fingerprint"]
        origin.files = header["files"]
        description = header["text"]
    else:
        text = open_text(origin.text, options)
        description = text.description
        notes = text.notes
        origin.fingerprint, origin.files = prepare.fingerprint_text(
            text, tokenizer, options, origin.held_out
        )
    if origin.text:
        hint = "; for your own: --data PATH" if origin.text.is_library else ""
        log(f"text           {origin.text.title}: {description}{hint}")
    for note in notes:
        log(note)


def require_same(expected: dict | None, fingerprint: str, files: dict[str, str]) -> None:
    """Raise UserError if a resumed run would continue with other data."""
    if expected is None or fingerprint == expected["fingerprint"]:
        return
    before = expected.get("files", {})
    differing = [
        f"{name} has changed" for name in files if before.get(name, files[name]) != files[name]
    ]
    differing += [f"{name} is new" for name in files if name not in before]
    differing += [f"{name} is missing" for name in before if name not in files]
    listed = "; ".join(differing[:3]) or "the tokenizer or the way the text is read differs"
    if not files or not before:
        listed = "it is unknown which files differ"
    raise UserError(
        f"--data: the run was trained on different text ({listed}); pass the same text to continue "
        "it, another --out, or --overwrite to start afresh"
    )


def estimate_tokens(
    texts: list[Source], tokenizer: Tokenizer, options: DataOptions, log: Log
) -> Dataset:
    """A dataset of estimated size: a sample's tokens per character, times the texts' characters."""
    n_tokens = 0
    for text in texts:
        opened = open_text(text, options)
        log(f"text           {opened.title}: {opened.description}")
        pieces, characters = sample(opened, options)
        found = sum(len(ids) for ids in tokenizer.encode_ordinary_batch(pieces))
        n_tokens += round(found / max(sum(map(len, pieces)), 1) * characters)
    log(f"tokens         about {n_tokens:,}, estimated from a sample; made when training starts")
    held_out = int(n_tokens * (options.val_fraction or prepare.HELD_OUT_DOCUMENTS))
    train, val = range(max(n_tokens - held_out, 2)), range(max(held_out, 2))
    return Dataset(Tokens([train], n_tokens), Tokens([val], held_out), fingerprint="")


def sample(text: Source, options: Reading) -> tuple[list[str], int]:
    """The first megabyte of a few files, and an estimate of the characters in all files."""
    pieces = []
    n_characters = 0
    # Each format by itself, since compressed text takes a third of the bytes.
    for file_format in sorted({file.file_format for file in text.files}):
        files = [file for file in text.files if file.file_format == file_format]
        n_read = 0  # bytes
        n_found = 0  # characters
        every = -(-len(files) // SAMPLED_FILES)
        for file in files[::every]:
            sizes = []
            length = 0
            bad = BadDocuments(file.path, options.skip_bad_documents)
            for piece, _ in read_pieces(file.path, file_format, options, bad, sizes.append):
                if length < PIECE:
                    pieces.append(piece)
                length += len(piece)
                if length > SAMPLED_TEXT:  # read-ahead hardly matters
                    break
            n_read += sum(sizes)
            n_found += length
        n_characters += round(n_found * sum(file.size for file in files) / max(n_read, 1))
    return pieces, n_characters

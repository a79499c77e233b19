"""Turn text into token shards once, on all cores: python -m gpt.data prepare SOURCE... --out FOLDER

    python -m gpt.data prepare 'fineweb-edu/*.parquet' --tokenizer gpt2 --out tokens/fineweb-edu
    python train.py gpt2 --data tokens/fineweb-edu

The same command continues after a stop or a kill. The shards are byte-for-byte the same for any
number of workers, and work on any machine. See docs/data.md.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich import filesize
from rich.console import Console

from gpt import cli
from gpt.config import optional
from gpt.data.options import Reading
from gpt.errors import positive, require


@dataclass(frozen=True)
class Prepare:
    """Tokenize text in any format into a folder for train.py --data."""

    sources: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="SOURCE ...", help_behavior_hint=""),
    ]
    """Text files, folders and patterns."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """The folder to create."""
    tokenizer: str
    """byte, char, bpe, gpt2, cl100k_base, o200k_base, or the path of a tokenizer."""
    vocab_size: int = 32_768
    """Vocabulary size of a bpe tokenizer, which is trained on the text."""
    workers: Annotated[int | None, optional("INT", "one per core")] = None
    """Number of tokenizing processes."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)

    def __post_init__(self):
        require(bool(self.sources), "prepare needs a SOURCE: a file, a folder or a pattern")
        if self.workers is not None:
            positive("workers", self.workers)


def main(argv: list[str]) -> None:
    word, *argv = argv or ["--help"]
    if word in ("-h", "--help"):
        argv = [word]
    else:
        require(word == "prepare", f"unknown command {word!r}: expected prepare")
    command = cli.parse(Prepare, argv, program="python -m gpt.data prepare", description=__doc__)
    from gpt.data import prepare, token_files
    from gpt.data.dataset import Origin, choose_tokenizer
    from gpt.data.progress import tokenizing_bar
    from gpt.data.sources import THREADS, find, open_text
    from gpt.data.token_store import TokenStore

    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    source = find(command.sources)
    text = open_text(source, command.reading)
    console.print(f"text           {source.title}: {text.description}", *text.notes, sep="\n")
    name = os.path.expanduser(command.tokenizer)
    held_out = command.reading.val_fraction
    with TokenStore(cli.cache_folder() / "tokens", keep=True) as kept:
        origin = Origin(None, held_out, text=source)
        tokenizer = choose_tokenizer(
            [origin], name, command.vocab_size, command.reading, kept, is_sample=False
        )
    fingerprint, files = prepare.fingerprint_text(text, tokenizer, command.reading, held_out)
    if token_files.is_prepared(command.out):
        is_same = token_files.read_header(command.out)["fingerprint"] == fingerprint
        require(is_same, f"{command.out} holds tokens of different text: choose a new folder")
        console.print(token_files.describe(command.out))
        return
    is_free = not command.out.exists() or (command.out.is_dir() and not any(command.out.iterdir()))
    require(is_free, f"{command.out} already exists and holds no tokens: choose a new folder")
    start = time.monotonic()
    with tokenizing_bar(console) as report:
        job = prepare.Job(
            text, tokenizer, command.reading, held_out, command.workers or THREADS, report
        )
        try:
            prepare.tokenize(job, command.out, fingerprint, files)
        except KeyboardInterrupt:
            console.print("stopped        repeat the command to continue")
            raise
    seconds = time.monotonic() - start
    console.print(token_files.describe(command.out))
    speed = filesize.decimal(int(source.size / max(seconds, 1e-3)))
    console.print(f"prepared       in {seconds:,.1f} s, {speed}/s of files")


if __name__ == "__main__":
    cli.run(main)

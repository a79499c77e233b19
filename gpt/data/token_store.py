"""Tokens kept from one run to the next, each in a folder that is named after its fingerprint.

`starts/` beside them remembers what files looked like (names, sizes, times) when their tokens were
made: files that still look so are not read again.
"""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt.data import tokenizers
from gpt.data.prepare import UNFINISHED, digest_of
from gpt.data.token_files import HEADER
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError


class TokenStore(contextlib.AbstractContextManager):
    """The folder `kept`; without `keep` it is read, and what is new is gone after the `with`."""

    def __init__(self, kept: Path, keep: bool):
        self.kept = kept
        self.keep = keep
        self.new = kept
        self.stack = contextlib.ExitStack()
        if not keep:
            # On POSIX tokens stay readable after their files are gone: they are mapped into memory.
            self.new = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))

    def __exit__(self, *error) -> None:
        self.stack.__exit__(*error)

    def folder(self, fingerprint: str) -> Path:
        """Where tokens of this fingerprint are, or are to be."""
        name = fingerprint[:32]
        return self.kept / name if self.is_whole(name) else self.new / name

    def is_whole(self, name: str) -> bool:
        return (self.kept / name / HEADER).is_file()

    def recall(self, start: Any) -> Path | None:
        """The folder of the tokens that were made from such a `start`, if they are there."""
        path = self.kept / "starts" / digest_of(start)
        name = path.read_text().strip() if path.is_file() else ""
        return self.kept / name if name and self.is_whole(name) else None

    def remember(self, start: Any, folder: Path) -> None:
        """Let a later `recall` of the same JSON value `start` find the folder."""
        if self.keep:
            self._write(digest_of(start), folder.name)

    def recall_tokenizer(self, start: Any) -> Tokenizer | None:
        """The tokenizer that was made from such a `start`."""
        path = self.kept / "starts" / f"{digest_of(start)}.tokenizer.json"
        return tokenizers.load(path) if path.is_file() else None

    def remember_tokenizer(self, start: Any, tokenizer: Tokenizer) -> None:
        """Let a later `recall_tokenizer` of the same JSON value find the tokenizer."""
        if self.keep:
            content = json.dumps(tokenizers.to_json(tokenizer))
            self._write(f"{digest_of(start)}.tokenizer.json", content)

    def _write(self, name: str, content: str) -> None:
        starts = self.kept / "starts"
        try:
            starts.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=starts, delete=False) as file:
                file.write(content)
            Path(file.name).replace(starts / name)
        except OSError as error:
            raise UserError(f"cannot write tokens to {self.kept}: {error}") from None

    def remove_leftovers(self, but: Path) -> None:
        """Remove what killed processes left unfinished, except for the tokens of the folder `but`,
        which will be completed, and for those that another process is making."""
        for unfinished in self.kept.glob(f"{UNFINISHED}*"):
            name = unfinished.name.removeprefix(UNFINISHED)
            with contextlib.suppress(Timeout, OSError):
                if name != but.name:
                    with FileLock(self.kept / f".{name}.lock", timeout=0):
                        shutil.rmtree(unfinished)

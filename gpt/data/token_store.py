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
from gpt.data.prepare import UNFINISHED
from gpt.data.token_files import is_prepared
from gpt.data.tokenizers import Tokenizer, sha256_of
from gpt.errors import UserError


class TokenStore(contextlib.AbstractContextManager):
    """The folder `kept`. Without `keep` new tokens are deleted at the end of the `with` block."""

    def __init__(self, kept: Path, keep: bool):
        self.kept = kept
        self.keep = keep
        self.new = kept
        self.stack = contextlib.ExitStack()
        if not keep:
            # Mapped into memory, tokens stay readable after their files are deleted (on POSIX).
            self.new = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))

    def __exit__(self, *error) -> None:
        self.stack.__exit__(*error)

    def folder(self, fingerprint: str) -> Path:
        """The folder for tokens with this fingerprint."""
        kept = self.kept / fingerprint[:32]
        return kept if is_prepared(kept) else self.new / kept.name

    def recall(self, key: Any) -> Path | None:
        """The folder of the tokens that were made from `key`, if it exists."""
        path = self.kept / "starts" / sha256_of(key)
        if not path.is_file():
            return None
        folder = self.kept / path.read_text().strip()
        return folder if is_prepared(folder) else None

    def remember(self, key: Any, folder: Path) -> None:
        """Let `recall` find the folder by the JSON value `key`."""
        if self.keep:
            self._write(sha256_of(key), folder.name)

    def recall_tokenizer(self, key: Any) -> Tokenizer | None:
        """The tokenizer that was made from `key`, if it is kept."""
        path = self.kept / "starts" / f"{sha256_of(key)}.tokenizer.json"
        return tokenizers.load(path) if path.is_file() else None

    def remember_tokenizer(self, key: Any, tokenizer: Tokenizer) -> None:
        """Let `recall_tokenizer` find the tokenizer by the JSON value `key`."""
        if self.keep:
            content = json.dumps(tokenizers.to_json(tokenizer))
            self._write(f"{sha256_of(key)}.tokenizer.json", content)

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
        """Remove the unfinished tokens of killed processes, except those for the folder `but`."""
        for unfinished in self.kept.glob(f"{UNFINISHED}*"):
            name = unfinished.name.removeprefix(UNFINISHED)
            with contextlib.suppress(Timeout, OSError):  # Timeout: a process is making them
                if name != but.name:
                    with FileLock(self.kept / f".{name}.lock", timeout=0):
                        shutil.rmtree(unfinished)

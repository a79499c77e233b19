"""Tokens kept from one run to the next, in folders named after their fingerprints.

Next to them, `starts/` records the names, sizes and times of files when their tokens were made, so
that unchanged files are not read again.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt.data.prepare import UNFINISHED
from gpt.data.token_files import is_prepared
from gpt.data.tokenizers import sha256_of
from gpt.errors import UserError


class TokenStore(contextlib.AbstractContextManager):
    """The folder `kept`. Without `keep`, new tokens are deleted at the end of the `with` block."""

    def __init__(self, kept: Path, keep: bool):
        self.kept = kept
        self.keep = keep
        self.new = kept
        self.stack = contextlib.ExitStack()
        if not keep:
            # Memory-mapped tokens stay readable after their files are deleted (on POSIX).
            self.new = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))

    def __exit__(self, *error) -> None:
        self.stack.__exit__(*error)

    def folder(self, fingerprint: str) -> Path:
        kept = self.kept / fingerprint[:32]
        return kept if is_prepared(kept) else self.new / kept.name

    def recall(self, key: Any) -> Path | None:
        """The file remembered under the JSON value `key`, if it exists."""
        path = self.kept / "starts" / sha256_of(key)
        return path if path.is_file() else None

    def recall_folder(self, key: Any) -> Path | None:
        """The folder of the tokens made from `key`, if it exists."""
        file = self.recall(key)
        if file and is_prepared(self.kept / file.read_text()):
            return self.kept / file.read_text()
        return None

    def remember(self, key: Any, content: str) -> None:
        """Store `content` under `key` for `recall`, if new tokens are kept."""
        if not self.keep:
            return
        starts = self.kept / "starts"
        try:
            starts.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=starts, delete=False) as file:
                file.write(content)
            Path(file.name).replace(starts / sha256_of(key))
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

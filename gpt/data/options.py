"""How text is read, held out and kept: flags of train.py and of `python -m gpt.data`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from gpt.config import optional
from gpt.errors import fraction, require


@dataclass(frozen=True)
class Reading:
    """How text becomes documents, and which of them are held out."""

    text_column: str = "text"
    """The column of parquet and arrow files, or the field of JSON records, that holds the text."""
    separator: str = "<|endoftext|>"
    """Text that ends a document and is dropped; \\n for a line end, none for no separator."""
    val_fraction: Annotated[float | None, optional("FLOAT", "1 in 20 documents")] = None
    """Share of the documents to hold out, or of the characters if there are few documents."""
    skip_bad_documents: bool = False
    """Skip and count documents and files that cannot be read, instead of stopping."""

    def __post_init__(self):
        if self.val_fraction is not None:
            fraction("--val-fraction", self.val_fraction)

    @property
    def end_of_document(self) -> str:
        """The separator itself; empty for none."""
        return "" if self.separator == "none" else self.separator.replace("\\n", "\n")

    @property
    def document_settings(self) -> list:
        """The settings that determine a file's documents."""
        return [self.text_column, self.end_of_document, self.skip_bad_documents]


@dataclass(frozen=True)
class DataOptions(Reading):
    """How train.py reads its data, and where it keeps the tokens."""

    val_data: Annotated[tuple[Path, ...] | None, optional("PATH [PATH ...]", "part of --data")] = (
        None
    )
    """Validation text or tokens, in any format; all of --data is then used for training."""
    tokens: Annotated[Path | None, optional("DIR", "tokens in your cache folder")] = None
    """Folder where tokens are kept for later runs."""
    verify_data: bool = False
    """Read and hash all data again, even if no file's name, size or time has changed."""

    def __post_init__(self):
        super().__post_init__()
        require(self.val_data != (), "--val-data needs at least one path")
        require(
            self.val_data is None or self.val_fraction is None,
            "--val-data and --val-fraction cannot be combined",
        )
        require(
            self.val_fraction != 0,
            "--val-fraction 0 holds nothing out: give --val-data, or a fraction above 0",
        )

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DataOptions":
        paths = {}
        if values.get("val_data"):
            paths["val_data"] = tuple(Path(path) for path in values["val_data"])
        if values.get("tokens"):
            paths["tokens"] = Path(values["tokens"])
        return cls(**(values | paths))

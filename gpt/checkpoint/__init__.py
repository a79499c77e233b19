"""Checkpoints: named trees of arrays and some JSON, each with a digest; orbax does the writing.

A run's folder holds `checkpoints/STEP`. Writing is asynchronous and atomic. Reading verifies: a
flipped bit in a file is otherwise loaded without a word. Arrays are stored under plain names
(`blocks/q`), so that what is stored depends on no Python class and no mesh.
Knows neither model nor optimizer.
"""

from gpt.checkpoint.folder import Damaged, Unsaved, place_of, steps
from gpt.checkpoint.quiet import hush_orbax
from gpt.checkpoint.reading import latest_good, restore
from gpt.checkpoint.record import read_metadata, read_record, read_shapes
from gpt.checkpoint.sparing import sparing
from gpt.checkpoint.writing import Writer
from gpt.digest import digest, named_leaves

__all__ = [
    "Damaged",
    "Unsaved",
    "Writer",
    "digest",
    "latest_good",
    "named_leaves",
    "place_of",
    "read_metadata",
    "read_record",
    "read_shapes",
    "restore",
    "sparing",
    "steps",
]

hush_orbax()

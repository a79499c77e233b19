"""Saving with hardly more memory than the arrays themselves. Knows nothing of what is saved."""

from collections.abc import Iterator
from contextlib import contextmanager

from orbax.checkpoint import v1 as ocp

CHUNK_BYTES = 2**25


@contextmanager
def sparing() -> Iterator[None]:
    """Writers made and used inside store each array in files of 32 MiB, written as they are made.

    By default orbax gathers all that a save writes, compressed, in memory before it writes a byte.
    What was stored this way is read like any other checkpoint.
    """
    saving = ocp.options.ArrayOptions.Saving
    chunks = saving.StorageOptions(chunk_byte_size=CHUNK_BYTES)
    arrays = ocp.options.ArrayOptions(saving=saving(storage_options=chunks, use_ocdbt=False))
    with ocp.Context(array_options=arrays):
        yield

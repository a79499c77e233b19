"""Documents in files of every format and compression, and as tokens."""

import bz2
import gzip
import io
import json
import lzma

import pyarrow
import pyarrow.parquet

from gpt.data import prepare, tokenizers
from gpt.data.options import Reading
from gpt.data.sources import find, open_text

BYTE = tokenizers.create("byte", lambda: (), 0)
PLAIN = Reading()
DOCS = ["eins", "zwei\nzeilen é 今天 🙂", '{"text": "quoted"}', "  spaced\r\n", "x" * 300]


def json_lines(docs, **more):
    return "".join(json.dumps({"url": "x", "text": doc} | more) + "\n" for doc in docs).encode()


def table(docs):
    return pyarrow.table({"id": list(range(len(docs))), "text": docs})


def parquet(docs):
    out = io.BytesIO()
    pyarrow.parquet.write_table(table(docs), out, row_group_size=2)
    return out.getvalue()


def arrow(docs, kind):
    out = io.BytesIO()
    made = table(docs)
    with getattr(pyarrow.ipc, kind)(out, made.schema) as writer:
        writer.write_table(made, max_chunksize=2)
    return out.getvalue()


WRITERS = {
    "text": lambda docs: "<|endoftext|>".join(docs).encode(),
    "JSON lines": json_lines,
    "JSON": lambda docs: json.dumps([{"text": doc} for doc in docs], indent=1).encode(),
    "parquet": parquet,
    "arrow": lambda docs: arrow(docs, "new_stream"),  # as datasets.save_to_disk writes
    "arrow file": lambda docs: arrow(docs, "new_file"),
}


COMPRESSORS = {
    "": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def write(path, form, compression="", docs=DOCS):
    path.write_bytes(COMPRESSORS[compression](WRITERS[form](docs)))
    return path


def tokenize(path, folder, held_out=None, reading=PLAIN):
    """The text of a path as byte tokens in a folder that train.py takes."""
    job = prepare.Job(open_text(find([path]), reading), BYTE, reading, held_out)
    prepare.tokenize(job, folder, "f", {})
    return folder

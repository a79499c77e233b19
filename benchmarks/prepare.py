"""Make a corpus in three formats, prepare it and load it: MB/s, memory, seconds.

    python benchmarks/prepare.py --gb 5 --folder /large/disk/corpus [--workers N]

Equal thirds are parquet, zstd-compressed JSON lines, and text with end-of-text markers, in files
of 250 MB of text. Words from the source of Python's standard library are sampled by Zipf's law, so
that tokenizers work as on real text. Prints one line of JSON. Needs pyarrow.
"""

import json
import resource
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from gpt.data import tokenizers  # noqa: E402
from gpt.data.dataset import load_dataset  # noqa: E402
from gpt.data.options import DataOptions  # noqa: E402

FILE_BYTES = 250e6  # of text per file
DOCUMENT = 500  # words, on average
FORMATS = ("parquet", "jsonl.zst", "txt")


def draw_documents(words: list[str], seed: int) -> list[str]:
    """Documents of about FILE_BYTES in total."""
    rng = np.random.default_rng(seed)
    documents = []
    size = 0
    while size < FILE_BYTES:
        n = int(rng.exponential(DOCUMENT)) + 20
        ranks = np.minimum(rng.zipf(1.2, n) - 1, len(words) - 1)
        text = " ".join([words[i] for i in ranks]).replace(" . ", ".\n")
        documents.append(text)
        size += len(text)
    return documents


def write_corpus(folder: Path, gb: float) -> None:
    """Write files in alternating formats, about `gb` of text in total; keep existing files."""
    import pyarrow.parquet  # an optional package

    folder.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_paths()["stdlib"])
    source = "".join(path.read_text(errors="ignore") for path in sorted(root.glob("*.py")))
    counts: dict[str, int] = {}
    for word in source.split():
        counts[word] = counts.get(word, 0) + 1
    words = sorted(counts, key=lambda word: -counts[word])
    for number in range(max(3, round(gb * 1e9 / FILE_BYTES))):
        form = FORMATS[number % len(FORMATS)]
        path = folder / f"{number:04}.{form}"
        if path.exists():
            continue
        documents = draw_documents(words, number)
        if form == "parquet":
            table = pyarrow.table({"id": range(len(documents)), "text": documents})
            pyarrow.parquet.write_table(table, path, row_group_size=1000, compression="zstd")
        elif form == "jsonl.zst":
            lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents)
            with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
                file.write(lines.encode())
        else:
            path.write_text("\n<|endoftext|>\n".join(documents))


def run(*argv: object) -> tuple[float, list[float]]:
    """Run a program; return its seconds, and the peak memory in MB of each of its processes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        try:
            whole = psutil.Process(process.pid)
            for one in (whole, *whole.children(recursive=True)):
                peaks[one.pid] = max(peaks.get(one.pid, 0), one.memory_info().rss)
        except psutil.Error:
            pass  # it has just ended
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start, [peak / 1e6 for peak in peaks.values()]


def seconds_to_load(data: Path, tokenizer: Path, store: Path, **options: bool) -> float:
    """Seconds that train.py would spend loading the data."""
    start = time.perf_counter()
    load_dataset([data], str(tokenizer), 0, DataOptions(), store=store, log=print, **options)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Args:
    """What to make, and where."""

    folder: Path
    """Folder for the corpus and its tokens, on a disk with room for three times --gb."""
    gb: float = 1.0
    """Corpus text in units of 10^9 bytes."""
    workers: int = psutil.cpu_count() or 1
    """Tokenizing processes."""
    kept: bool = False
    """Also tokenize as train.py does."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    corpus = args.folder / "corpus"
    write_corpus(corpus, args.gb)
    tokenizer = args.folder / "tokenizer.json"
    if not tokenizer.exists():
        sample = (corpus / "0002.txt").read_text()[:20_000_000]
        tokenizers.save(tokenizers.create("bpe", lambda: [sample], 32_768), tokenizer)

    out = args.folder / f"tokens-{args.workers}"
    options = ("--tokenizer", tokenizer, "--out", out, "--workers", args.workers)
    seconds, peaks = run("-m", "gpt.data", "prepare", corpus, *options)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    header = json.loads((out / "tokens.json").read_text())
    text_bytes = sum(split["text_bytes"] for split in header["splits"].values())
    first, *workers = peaks

    # Loading time at the start of train.py: prepared tokens, a plan from text, and text with cached
    # tokens.
    start_prepared = seconds_to_load(out, tokenizer, args.folder / "kept")
    plan = seconds_to_load(corpus, tokenizer, args.folder / "kept", estimate=True, keep=False)
    if args.kept:
        seconds_to_load(corpus, tokenizer, args.folder / "kept")
    result = {
        "text_mb": text_bytes / 1e6,
        "seconds": seconds,
        "mb_per_second": text_bytes / 1e6 / seconds,
        "mb_per_cpu_second": text_bytes / 1e6 / (used.ru_utime + used.ru_stime),
        "workers": args.workers,
        "first_process_mb": first,
        "worker_mb": max(workers, default=0),
        "start_prepared_seconds": start_prepared,
        "plan_of_text_seconds": plan,
    }
    if args.kept:
        result["start_kept_seconds"] = seconds_to_load(corpus, tokenizer, args.folder / "kept")
    print(json.dumps({name: round(value, 1) for name, value in result.items()}))


if __name__ == "__main__":
    main()

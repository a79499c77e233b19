"""Turn text into token shards on all cores, in bounded memory, resumable after a kill.

A text's files are grouped into tasks, which depend only on the files. Each task writes its own
shards and a journal of its progress, so the bytes are the same for any number of workers, and a
killed task reads its text again but encodes only what is missing.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from gpt.data import tokenizers
from gpt.data.formats import BadDocuments, read_pieces
from gpt.data.options import Reading
from gpt.data.sources import THREADS, Source, SourceFile, describe_file
from gpt.data.token_files import HEADER, SPLITS, VERSION, hash_file, is_prepared, token_type
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError, require

TASK_BYTES = 2**26  # of files per task, unless one file is larger
GROUP = 2**22  # characters encoded per journal entry
WORTH_WORKERS = 2**25  # with fewer bytes, starting processes takes longer than it saves
MIN_DOCUMENTS = 20  # with at least this many, whole documents are held out
HELD_OUT_DOCUMENTS = 0.05  # share of the documents, if there are many
HELD_OUT_TAIL = 0.1  # share of the characters, if there are few documents
UNFINISHED = ".unfinished-"

Progress = Callable[[int, int], None]  # called with the bytes of files done, and the total
Part = tuple[str, str, bool]  # split, text, whether a document ends with it


@dataclass(frozen=True)
class HoldOut:
    """Which part of a text is held out for validation.

    share: of the documents; 0 for none. Documents are chosen by a hash of their content, so none
        moves into training when the text grows.
    tail_from: characters before the held-out tail of a text with few documents; else None.
    marks_ends: whether end-of-text follows each document, as it does unless there is only one.
    """

    share: float
    tail_from: int | None = None
    marks_ends: bool = True


@dataclass(frozen=True)
class Task:
    """Files to turn into the shards `number` of `folder`; `size`: their bytes."""

    number: int
    folder: Path
    files: list[SourceFile]
    size: int
    reading: Reading
    hold_out: HoldOut


@dataclass
class Counts:
    """A task's results, and its journal."""

    rule: str = ""  # repr of the HoldOut
    groups: int = 0  # of text whose tokens are on disk
    is_done: bool = False
    documents: int = 0
    bad_documents: int = 0
    first_bad: str = ""
    characters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    sha256: dict[str, str] = field(default_factory=dict)

    def add(self, group: list[Part]) -> None:
        self.groups += 1
        for split, text, last in group:
            self.documents += last
            self.characters[split] += len(text)
            self.text_bytes[split] += len(text.encode())


@dataclass(frozen=True, eq=False)
class Job:
    """What to tokenize, and with how many processes.

    held_out: the share of the text to hold out; None for the default, 0 for nothing, 1 for all.
    """

    text: Source
    tokenizer: Tokenizer
    reading: Reading
    held_out: float | None
    workers: int = THREADS
    progress: Progress = lambda done, total: None


def token_settings(tokenizer: Tokenizer, reading: Reading, held_out: float | None) -> list:
    """Everything besides the files that changes a text's tokens, as a JSON value."""
    return [VERSION, tokenizers.digest(tokenizer), reading.document_settings, held_out]


def fingerprint_text(
    text: Source, tokenizer: Tokenizer, reading: Reading, held_out: float | None
) -> tuple[str, dict[str, str]]:
    """The fingerprint of a text's tokens, and each file's hash by name; reads all files."""
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(hash_file, [file.path for file in text.files]))
    names = [file.name for file in text.files]
    formats = [file.file_format for file in text.files]
    settings = token_settings(tokenizer, reading, held_out)
    return tokenizers.sha256_of([*settings, hashes, formats]), dict(zip(names, hashes, strict=True))


def tokenize(job: Job, folder: Path, fingerprint: str, files: dict[str, str]) -> None:
    """Create the token folder `folder` unless it exists; UserError if that fails.

    It has a temporary name until it is complete. An unfinished one with the same `fingerprint` is
    completed. files: each file's digest, for the header.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    begun = unfinished / "fingerprint"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # One process tokenizes; others that want the same tokens wait for it.
        lock = folder.with_name(f".{folder.name}.lock")
        with FileLock(lock):
            if is_prepared(folder):
                return
            unfinished.mkdir(exist_ok=True)
            if not begun.is_file() or begun.read_text() != fingerprint:
                remove_shards(unfinished)
                begun.write_text(fingerprint)
            tokenizers.save(job.tokenizer, unfinished / "tokenizer.json")
            header = {
                "version": VERSION,
                "fingerprint": fingerprint,
                "text": job.text.description,
                "separator": job.reading.end_of_document,
                "tokenizer_digest": tokenizers.digest(job.tokenizer),
                "dtype": token_type(job.tokenizer).name,
                **fill(job, unfinished),
                "files": files,
            }
            for file in job.text.files:
                is_same = describe_file(file.path, file.name).stat == file.stat
                require(is_same, f"{file.path} changed while it was read: start again")
            for journal in [begun, *unfinished.glob("[0-9]*.json")]:
                journal.unlink()
            (unfinished / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
            unfinished.rename(folder)
            lock.unlink(missing_ok=True)  # a process waiting for it finds the folder
    except OSError as error:
        raise UserError(f"cannot write tokens to {folder}: {error}") from None


def fill(job: Job, folder: Path) -> dict[str, Any]:
    """Write a text's shards, and return their part of the header."""
    few = count_few(job)
    marks_ends = few is None or len(few) > 1
    tail = HELD_OUT_TAIL if job.held_out is None else job.held_out
    if job.held_out in (0, 1):
        hold_out = HoldOut(job.held_out, marks_ends=marks_ends)
    elif few is not None:
        hold_out = HoldOut(0, int(sum(few) * (1 - tail)), marks_ends)
    else:
        hold_out = HoldOut(HELD_OUT_DOCUMENTS if job.held_out is None else job.held_out)

    results = run_tasks(job, hold_out, folder)
    characters = sum(sum(result.characters.values()) for result in results)
    if 0 < hold_out.share < 1:
        share = sum(result.characters["val"] for result in results) / max(characters, 1)
        if not hold_out.share / 5 <= share <= hold_out.share * 4:
            # One document is a large part of the text, so whole documents are a poor sample.
            remove_shards(folder)
            hold_out = HoldOut(0, int(characters * (1 - tail)))
            results = run_tasks(job, hold_out, folder)

    splits = {}
    for split, purpose in SPLITS.items():
        n_tokens = sum(result.tokens[split] for result in results)
        is_empty = job.held_out == {"train": 1, "val": 0}[split]
        require(
            n_tokens >= 2 or is_empty,
            f"the text is too small: its {characters:,} characters leave fewer than two tokens "
            f"for {purpose}, use more text",
        )
        splits[split] = {
            "tokens": n_tokens,
            "text_bytes": sum(result.text_bytes[split] for result in results),
            "shards": [
                {
                    "file": shard_name(split, number),
                    "tokens": result.tokens[split],
                    "sha256": result.sha256[split],
                }
                for number, result in enumerate(results)
                if result.tokens[split]
            ],
        }
    return {
        "documents": sum(result.documents for result in results),
        "bad_documents": sum(result.bad_documents for result in results),
        "first_bad": next((result.first_bad for result in results if result.first_bad), ""),
        "splits": splits,
    }


def count_few(job: Job) -> list[int] | None:
    """The characters of each document, if there are fewer than MIN_DOCUMENTS; else None."""
    counts = [0]
    for piece, last in job.text.pieces(job.reading):
        counts[-1] += len(piece)
        if last:
            counts.append(0)
        if len(counts) > MIN_DOCUMENTS:
            return None
    return counts[:-1]


def remove_shards(folder: Path) -> None:
    for path in [*folder.glob("*.bin"), *folder.glob("[0-9]*.json")]:
        path.unlink()


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05}.bin"


# ------------------------------------------------------------ tasks and workers


def run_tasks(job: Job, hold_out: HoldOut, folder: Path) -> list[Counts]:
    """Tokenize all files, here or in worker processes; returns each task's counts."""
    tasks = []
    files: list[SourceFile] = []
    size = 0
    for file in job.text.files:
        files.append(file)
        size += file.size
        is_full = size >= TASK_BYTES and hold_out.tail_from is None  # a tail needs all the text
        if is_full or file is job.text.files[-1]:
            tasks.append(Task(len(tasks), folder, files, size, job.reading, hold_out))
            files = []
            size = 0

    total = sum(task.size for task in tasks)
    workers = min(job.workers, len(tasks))
    if workers > 1 and total >= WORTH_WORKERS:
        return run_in_workers(job, tasks, workers)

    done = 0

    def add(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        job.progress(done, total)

    return [run_task(task, job.tokenizer, THREADS, add) for task in tasks]


def run_in_workers(job: Job, tasks: list[Task], workers: int) -> list[Counts]:
    """Run the tasks in processes that end with this one; returns each task's counts."""
    total = sum(task.size for task in tasks)
    folder = tasks[0].folder
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    done = context.Array("q", len(tasks), lock=False)  # bytes done per task
    threads = max(1, THREADS // workers)
    pool = ProcessPoolExecutor(workers, context, start_worker, (folder, threads, done))
    try:
        futures = [pool.submit(run_in_worker, task) for task in tasks]
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            job.progress(sum(done), total)
            for future in finished:
                future.result()
        pool.shutdown()
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise UserError(
            "a tokenizing process was killed, perhaps because memory ran out: repeat the "
            "command to continue, with fewer --workers to need less memory"
        ) from None
    finally:
        # After a failure, stop all other workers.
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)


def start_worker(folder: Path, threads: int, done: Any) -> None:
    """Load a worker's tokenizer, and make the worker end when the first process does."""
    global in_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process gets it and ends the workers
    in_worker = (tokenizers.load(folder / "tokenizer.json"), threads, done)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def run_in_worker(task: Task) -> Counts:
    tokenizer, threads, done = in_worker

    def add(n_bytes: int) -> None:
        done[task.number] += n_bytes

    return run_task(task, tokenizer, threads, add)


def run_task(
    task: Task, tokenizer: Tokenizer, threads: int, report: Callable[[int], None]
) -> Counts:
    """Write a task's shards, continuing where its journal ends.

    report: called with the bytes of files read since the last call.
    """
    journal = task.folder / f"{task.number:05}.json"
    saved = Counts(rule=repr(task.hold_out))
    if journal.is_file():
        found = Counts(**json.loads(journal.read_text()))
        saved = found if found.rule == saved.rule else saved
    if saved.is_done:
        report(task.size)
        return saved

    # Cut off what was written after the journal's last entry.
    counts = Counts(rule=saved.rule, tokens=saved.tokens)
    dtype = token_type(tokenizer)
    paths = {split: task.folder / shard_name(split, task.number) for split in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(path.open("ab")) for split, path in paths.items()}
        for split, file in files.items():
            file.truncate(saved.tokens[split] * dtype.itemsize)
        for group in groups(assign(task, counts, report)):
            counts.add(group)
            if counts.groups <= saved.groups:
                continue
            for split, ids in encode(group, tokenizer, threads, task.hold_out.marks_ends):
                files[split].write(np.array(ids, dtype))
                counts.tokens[split] += len(ids)
            for file in files.values():
                file.flush()
            write_journal(journal, counts)

    for split, path in paths.items():
        counts.sha256[split] = hash_file(path)
        if not counts.tokens[split]:
            path.unlink()
    counts.is_done = True
    write_journal(journal, counts)
    return counts


def encode(
    group: list[Part], tokenizer: Tokenizer, threads: int, marks_ends: bool
) -> Iterator[tuple[str, list[int]]]:
    """The split and the ids of each piece of a group."""
    texts = [text for _, text, _ in group]
    encoded = tokenizer.encode_ordinary_batch(texts, num_threads=threads)
    for ids, (split, _, last) in zip(encoded, group, strict=True):
        if last and marks_ends:
            ids.append(tokenizer.eot_token)
        yield split, ids


def write_journal(path: Path, counts: Counts) -> None:
    """Replace a journal, whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(dataclasses.asdict(counts)))
    new.replace(path)


def assign(task: Task, counts: Counts, report: Callable[[int], None]) -> Iterator[Part]:
    """Every piece of a task's text in order, with its split. Counts unreadable documents."""
    threshold = int(task.hold_out.share * 2**64)
    tail_from = task.hold_out.tail_from
    position = 0  # characters before the piece
    for file in task.files:
        bad = BadDocuments(file.path, task.reading.skip_bad_documents)
        is_first = True  # whether the next piece starts a document
        split = "train"
        for text, last in read_pieces(file.path, file.file_format, task.reading, bad, report):
            if threshold and is_first:
                digest = hashlib.sha256(text.encode()).digest()
                is_held_out = int.from_bytes(digest[:8], "little") < threshold
                split = "val" if is_held_out else "train"
            is_first = last

            if tail_from is not None:
                before_tail = tail_from - position
                position += len(text)
                if 0 < before_tail < len(text):
                    yield "train", text[:before_tail], False
                    text = text[before_tail:]
                    split = "val"
                else:
                    split = "train" if before_tail > 0 else "val"
            yield split, text, last
        counts.bad_documents += bad.count
        counts.first_bad = counts.first_bad or bad.first


def groups(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Consecutive pieces, together about GROUP characters."""
    group = []
    length = 0
    for part in parts:
        group.append(part)
        length += len(part[1])
        if length >= GROUP:
            yield group
            group = []
            length = 0
    if group:
        yield group

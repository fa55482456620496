"""Labelled sentences for classifiers: files in the format of SST-2, or lines of Python's standard library.

A TSV has the header `sentence<TAB>label` and an example a line; a label is an integer from 0. The task of the standard library
is to tell prose (comments and docstrings, without their marks) from code, one line at a time.
"""

from __future__ import annotations

import io
import random
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from . import UsageError
from .data import (
    BYTES,
    HELD_OUT_FRACTION,
    STDLIB,
    find_files,
    fingerprint_of,
    held_out_rows,
    load_pretrained_tokenizer,
    read_documents,
    training_rows,
)

HEADER = "sentence\tlabel"
CODE, PROSE = 0, 1
MOST_LABELS = 1000
STDLIB_BYTES = 3_000_000
SHORTEST_LINE = 12

Sentence = tuple[str, int]


class RowTokenizer(Protocol):
    """A sentence a row: its first token stands for the whole, what is behind its end is `pad_id`."""

    vocab_size: int
    pad_id: int

    def encode(self, sentences: list[str], length: int) -> Tensor:
        """Ids (sentences, length), int32; what is too long is cut."""
        ...


class ByteRows:
    """0 pads, 1 begins a sentence, a byte b is b + 2."""

    vocab_size = 258
    pad_id = 0

    def encode(self, sentences: list[str], length: int) -> Tensor:
        rows = torch.zeros(len(sentences), length, dtype=torch.int32)
        rows[:, 0] = 1
        for row, sentence in zip(rows, sentences, strict=True):
            data = bytearray(sentence.encode("utf-8", errors="replace")[: length - 1])
            row[1 : 1 + len(data)] = torch.frombuffer(data, dtype=torch.uint8).int() + 2
        return rows


class PretrainedRows:
    """The tokens of a Hugging Face tokenizer in a local directory."""

    def __init__(self, path: str) -> None:
        self._tokenizer = load_pretrained_tokenizer(path)
        if self._tokenizer.pad_token_id is None:
            raise UsageError(f"tokenizer {path!r} has no padding token: give one that has, or {BYTES!r}")
        self.vocab_size = len(self._tokenizer)
        self.pad_id: int = self._tokenizer.pad_token_id

    def encode(self, sentences: list[str], length: int) -> Tensor:
        rows = self._tokenizer(sentences, padding="max_length", truncation=True, max_length=length)["input_ids"]
        return torch.tensor(rows, dtype=torch.int32)


def load_row_tokenizer(name: str) -> RowTokenizer:
    """`bytes`, or a local Hugging Face tokenizer by path."""
    return ByteRows() if name == BYTES else PretrainedRows(name)


@dataclass(frozen=True, eq=False)
class Rows:
    """Examples: ids (n, length) and labels (n,), int32."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class SentenceBatches:
    """Batches of (input_ids, attention_mask, labels), int64, the first two of shape (batch_size, length)."""

    train_examples: Rows
    held_out_examples: Rows
    pad_id: int
    batch_size: int
    seed: int

    @property
    def labels(self) -> int:
        """How many there are."""
        return 1 + int(max(rows.labels.max() for rows in (self.train_examples, self.held_out_examples)))

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.train_examples.ids.shape[1]

    @property
    def train_tokens(self) -> int:
        return int((self.train_examples.ids != self.pad_id).sum())

    @property
    def fingerprint(self) -> str:
        """A hash of the training examples, to tell whether two runs see the same."""
        return fingerprint_of(torch.cat([self.train_examples.ids, self.train_examples.labels[:, None]], dim=1))

    def train(self, number: int) -> tuple[Tensor, ...]:
        """The training batch of that number, the same for every run with this seed."""
        rows = training_rows(len(self.train_examples), self.batch_size, self.seed, number)
        return self._batch(self.train_examples, rows)

    def held_out(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        """At most `count` validation batches."""
        for rows in held_out_rows(len(self.held_out_examples), self.batch_size, count):
            yield self._batch(self.held_out_examples, rows)

    def all_held_out(self) -> Iterator[tuple[Tensor, ...]]:
        """Every held-out example once; the last batch may be smaller."""
        for start in range(0, len(self.held_out_examples), self.batch_size):
            yield self._batch(self.held_out_examples, slice(start, start + self.batch_size))

    def _batch(self, examples: Rows, rows: Tensor | slice) -> tuple[Tensor, ...]:
        ids = examples.ids[rows].long()
        return ids, (ids != self.pad_id).long(), examples.labels[rows].long()


def load_sentences(source: str, tokenizer: RowTokenizer, batch_size: int, length: int, seed: int) -> SentenceBatches:
    """Read and encode `source`: `stdlib`, a TSV (the last 5 % are held out), or a directory with train.tsv and dev.tsv."""
    if source == STDLIB:
        train, held_out = _split(list(prose_and_code(read_documents(find_files(STDLIB), STDLIB_BYTES))))
    elif Path(source).is_dir():
        train, held_out = (read_tsv(Path(source, name)) for name in ("train.tsv", "dev.tsv"))
    else:
        train, held_out = _split(read_tsv(Path(source)))
    for name, sentences in (("training", train), ("validation", held_out)):
        if len(sentences) < batch_size:
            raise UsageError(
                f"data {source!r} has {len(sentences)} examples for {name}, fewer than a batch of {batch_size}. "
                "Give more, or a smaller --batch-size"
            )
    return SentenceBatches(
        _encode(train, tokenizer, length), _encode(held_out, tokenizer, length), tokenizer.pad_id, batch_size, seed
    )


def _encode(sentences: list[Sentence], tokenizer: RowTokenizer, length: int) -> Rows:
    texts, labels = zip(*sentences, strict=True)
    return Rows(tokenizer.encode(list(texts), length), torch.tensor(labels, dtype=torch.int32))


def _split(sentences: list[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    split = len(sentences) - int(len(sentences) * HELD_OUT_FRACTION)
    return sentences[:split], sentences[split:]


def read_tsv(path: Path) -> list[Sentence]:
    """The examples of a file in the format of SST-2."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        allowed = f"{STDLIB!r}, a TSV in UTF-8, or a directory with train.tsv and dev.tsv"
        raise UsageError(f"data {str(path)!r} cannot be read ({error}): give {allowed}") from error
    if lines[0].rstrip("\r") != HEADER:
        raise _malformed(path, 1, lines[0], f"the header {HEADER!r}")
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines[1:], start=2)]
    return [_parse(path, number, line) for number, line in numbered if line]


def _parse(path: Path, number: int, line: str) -> Sentence:
    sentence, tab, label = line.partition("\t")
    known = label.isascii() and label.isdecimal() and int(label) < MOST_LABELS
    if not (sentence.strip() and tab and known):
        raise _malformed(path, number, line, f"a sentence, one tab and a label, an integer from 0 to {MOST_LABELS - 1}")
    return sentence, int(label)


def _malformed(path: Path, number: int, line: str, allowed: str) -> UsageError:
    shown = line if len(line) <= 80 else line[:77] + "..."
    return UsageError(f"{path}, line {number}: {shown!r} is not allowed. Allowed: {allowed}")


def prose_and_code(documents: Iterable[str]) -> Iterator[Sentence]:
    """Lines of Python files, each once, of each file as many of prose as of code."""
    seen: set[str] = set()
    for number, source in enumerate(documents):
        try:
            kinds = split_lines(source)
        except (tokenize.TokenError, SyntaxError):  # the last file is cut, and some of the library's tests are no Python
            continue
        seen.update(set(kinds[CODE]) & set(kinds[PROSE]))  # no one can tell
        fresh = [[line for line in dict.fromkeys(lines) if line not in seen] for lines in kinds]
        count = min(map(len, fresh))
        code, prose = (random.Random(number).sample(lines, count) for lines in fresh)
        seen.update(code, prose)
        yield from (pair for two in zip(code, prose, strict=True) for pair in zip(two, (CODE, PROSE), strict=True))


def split_lines(source: str) -> tuple[list[str], list[str]]:
    """The lines of code and of prose (CODE, PROSE) of one Python file, short ones left out. Lines of code with a comment
    behind it, or of a string over several lines that is no docstring, are neither."""
    prose: list[str] = []
    taken: set[int] = set()
    begins = True  # a statement
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            taken.add(token.start[0])
            prose += [token.string.lstrip("#!:")] if token.line.lstrip().startswith("#") else []
        elif token.start[0] < token.end[0] or (begins and token.type == tokenize.STRING):
            taken.update(range(token.start[0], token.end[0] + 1))
            if begins and token.type == tokenize.STRING:
                prose += token.string.lstrip("rRuUbB").strip("\"'").splitlines()
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    code = [line for number, line in enumerate(source.splitlines(), start=1) if number not in taken]
    return _long_enough(code), _long_enough(prose)


def _long_enough(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if len(line.strip()) >= SHORTEST_LINE]

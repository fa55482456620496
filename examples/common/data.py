"""Text for language models: files -> one stream of token ids -> batches addressed by number.

A batch is a pure function of (seed, number), so the position in the data is one integer. That
integer is all a checkpoint keeps of the data, and two runs with one seed read the same batches.
"""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import UsageError

STDLIB = "stdlib"
BYTES = "bytes"
HELD_OUT_FRACTION = 0.05
NOT_THE_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


class Tokenizer(Protocol):
    """Text to token ids; `end` is the id written after each document, or None."""

    name: str
    vocab_size: int
    end: int | None

    def encode(self, text: str) -> Tensor:
        """The ids of `text`, one-dimensional int32."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 for the end of a document."""

    name = BYTES
    vocab_size = 257
    end: int | None = 256

    def encode(self, text: str) -> Tensor:
        data = bytearray(text.encode("utf-8", errors="replace"))
        return torch.frombuffer(data, dtype=torch.uint8).to(torch.int32)


def load_pretrained_tokenizer(path: str) -> Any:
    """A Hugging Face tokenizer from a local directory; nothing is downloaded."""
    from transformers import AutoTokenizer

    allowed = f"give {BYTES!r} or a local directory with a Hugging Face tokenizer"
    if not Path(path).is_dir():
        raise UsageError(f"tokenizer {path!r} is not a directory: {allowed}")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer {path!r} cannot be read ({error}): {allowed}") from error


class LocalTokenizer:
    """A Hugging Face tokenizer, for a stream of text."""

    def __init__(self, path: str) -> None:
        self._tokenizer = load_pretrained_tokenizer(path)
        self.name = path
        self.vocab_size = len(self._tokenizer)
        self.end: int | None = self._tokenizer.eos_token_id

    def encode(self, text: str) -> Tensor:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int32)


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or a local Hugging Face tokenizer by path."""
    return ByteTokenizer() if name == BYTES else LocalTokenizer(name)


def find_files(source: str) -> list[Path]:
    """The text files of `source` in order: `stdlib`, a file, or a directory (no hidden ones)."""
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return [path for path in _walk(root) if path.suffix == ".py"]
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        return [file for file in _walk(path) if _is_text(file)]
    raise UsageError(f"data {source!r} not found: give {STDLIB!r}, a text file or a directory")


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in NOT_THE_STDLIB and not n.startswith("."))
        yield from (Path(folder, file) for file in sorted(files) if not file.startswith("."))


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(4096)


def read_documents(files: list[Path], max_bytes: int) -> Iterator[str]:
    """The files' text in an order shuffled once for all (not alphabetical), up to `max_bytes`."""
    order = list(files)
    random.Random(0).shuffle(order)
    left = max_bytes
    for path in order:
        if left <= 0:
            return
        with path.open("rb") as file:
            data = file.read(left)
        left -= len(data)
        yield data.decode("utf-8", errors="replace")


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> Tensor:
    """One stream of ids, each document followed by the tokenizer's end id if it has one."""
    end = [] if tokenizer.end is None else [torch.tensor([tokenizer.end], dtype=torch.int32)]
    pieces = [piece for text in documents if text for piece in (tokenizer.encode(text), *end)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)


@lru_cache(maxsize=2)
def _epoch_order(windows: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(windows, generator=generator)


def training_rows(available: int, batch_size: int, seed: int, number: int) -> Tensor:
    """Which rows make the training batch of that number, in an order drawn anew each epoch."""
    epoch, index = divmod(number, available // batch_size)
    order = _epoch_order(available, seed, epoch)
    return order[index * batch_size : (index + 1) * batch_size]


def held_out_rows(available: int, batch_size: int, count: int) -> Iterator[slice]:
    """At most `count` whole batches spread evenly over the rows, always the same ones."""
    whole = available // batch_size
    count = min(count, whole)
    for number in range(count):
        start = number * whole // count * batch_size
        yield slice(start, start + batch_size)


def fingerprint_of(tensor: Tensor) -> str:
    """A hash of its bytes."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class TextBatches:
    """Batches of (input_ids, labels), each int64 of shape (batch_size, seq_len).

    The stream is cut into windows of `seq_len`; its tail is held out.
    """

    train_windows: Tensor
    held_out_windows: Tensor
    batch_size: int
    seed: int

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.train_windows.shape[1]

    @property
    def train_tokens(self) -> int:
        return self.train_windows.numel()

    @property
    def fingerprint(self) -> str:
        """A hash of the training text as read, to tell whether two runs see the same."""
        return fingerprint_of(self.train_windows)

    def train(self, number: int) -> tuple[Tensor, Tensor]:
        """The training batch of that number, the same for every run with this seed."""
        return _as_batch(self.train_windows[training_rows(len(self.train_windows), self.batch_size, self.seed, number)])

    def held_out(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most `count` validation batches."""
        for rows in held_out_rows(len(self.held_out_windows), self.batch_size, count):
            yield _as_batch(self.held_out_windows[rows])


def _as_batch(windows: Tensor) -> tuple[Tensor, Tensor]:
    ids = windows.to(torch.int64)
    return ids, ids.clone()


def load_text(source: str, tokenizer: Tokenizer, batch_size: int, seq_len: int, seed: int, max_bytes: int) -> TextBatches:
    """Read, encode and split `source`; the last 5 % of the stream are held out for validation."""
    tokens = encode_documents(read_documents(find_files(source), max_bytes), tokenizer)
    windows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
    held_out = max(batch_size, int(len(windows) * HELD_OUT_FRACTION))
    if len(windows) - held_out < batch_size:
        raise UsageError(
            f"data {source!r} has {len(tokens)} tokens, too few for training and validation: a "
            f"batch is {batch_size} x {seq_len}, at least {2 * batch_size * seq_len} are needed. "
            "Give more text, or a smaller --batch-size or --seq-len"
        )
    split = len(windows) - held_out
    return TextBatches(windows[:split], windows[split:], batch_size, seed)

"""Collected transitions on disk: a convenience that can be deleted at any time, and never changes a number.

    <folder>/<sha256>.npz    the arrays of one seed; the name hashes all that decides them

What decides them: environment, seed, number of steps; the code that acts and simulates; package versions and the lock;
the processor, whose instructions may round differently. Whatever does not fit is collected again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dynarep import fingerprint, records
from dynarep.errors import UserError
from dynarep.files import checkout
from dynarep.protocols import collect


class Folder:
    """A store for `collect.kept_in`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, what: Mapping[str, Any]) -> Path:
        """Return the file for something collected by this code on this machine."""
        made = {
            "code": fingerprint.of_modules(fingerprint.modules(collect.__name__)),
            "lock": fingerprint.of_lock(checkout()),
            "versions": records.versions(),
            "cpu": records.cpu_model(),
        }
        text = json.dumps({**what, **made}, sort_keys=True, allow_nan=False)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"

    def find(self, what: Mapping[str, Any]) -> collect.Arrays | None:
        """Return the arrays; None if there is no file, or a damaged one (each array has a checksum in it)."""
        try:
            with np.load(io.BytesIO(self.path(what).read_bytes()), allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except Exception:  # absent, torn, foreign: whatever is wrong with it, collecting again is right
            return None

    def keep(self, what: Mapping[str, Any], arrays: collect.Arrays) -> None:
        """Write the arrays. What cannot be written is only collected again some day."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        with suppress(UserError):
            records.atomic_write(self.path(what), buffer.getvalue())


@contextmanager
def cached_in(folder: Path | None) -> Iterator[None]:
    """Keep what protocols collect within this context in `folder`, and take it from there; None for no cache."""
    with collect.kept_in(Folder(folder) if folder else None):
        yield

"""Reading what anybody may have written: results from elsewhere are data, never followed and never run.

A file is opened only if it is a regular one, not a link, and no larger than a limit; JSON is refused if it nests
deeply, gives a key twice or holds NaN. Nothing here unpickles. Source: ours.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST_BYTES = 2**20  # ours: a manifest takes 4 KiB
METRICS_BYTES = 2**26  # the longest run of the paper tier records some 2 MiB
PRODUCT_BYTES = 2**26  # a figure or a report
VERDICTS_BYTES = 2**24
DEEPEST = 32  # nested lists and mappings in JSON; a manifest has 4


class UntrustedError(ValueError):
    """What was found instead of a file or content that can be believed; `kind` is a word of `audit.KINDS`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_bytes(path: Path, most: int) -> bytes:
    """Return a regular file's content.

    Raises:
        FileNotFoundError: nothing is there.
        UntrustedError: a link, no regular file, larger than `most` bytes, or it cannot be read.
    """
    try:
        # a pipe would block without O_NONBLOCK; a link ends in ELOOP with O_NOFOLLOW
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise UntrustedError("link", "is a link; it is not followed") from None
        raise
    except (OSError, ValueError) as error:
        if path.is_symlink():
            raise UntrustedError("link", "is a link; it is not followed") from None
        raise UntrustedError("malformed", f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise UntrustedError("link", "cannot be read: is no regular file")
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size > most:
            raise UntrustedError("size", f"is too large to be read: {found.st_size:,} bytes, at most {most:,}")
        try:
            return file.read(most)
        except OSError as error:
            raise UntrustedError("malformed", f"cannot be read: {error.strerror}") from None


def linked(folder: Path, depth: int) -> Path | None:
    """Return the first link among a folder and its `depth` - 1 parents; None if there is none."""
    return next((place for place in (folder, *folder.parents)[:depth] if place.is_symlink()), None)


def parse_json(data: bytes) -> Any:
    """Return the content of a JSON file.

    Raises:
        UntrustedError: not UTF-8 or not JSON, a key given twice, a number that is none, nested too deeply.
    """
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
        _check_depth(content)
    except RecursionError:
        raise UntrustedError("malformed", "is nested too deeply") from None
    except UnicodeDecodeError:
        raise UntrustedError("malformed", "is not UTF-8") from None
    except UntrustedError:
        raise
    except ValueError as error:
        raise UntrustedError("malformed", f"is not JSON: {error}") from None
    return content


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UntrustedError("malformed", f"gives the key {key!r:.60} twice")
        found[key] = value
    return found


def _no_constant(word: str) -> Any:
    raise UntrustedError("malformed", f"holds {word}, which is not JSON")


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEEPEST):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise UntrustedError("malformed", f"is nested more than {DEEPEST} deep")

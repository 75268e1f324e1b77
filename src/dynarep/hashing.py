"""Content -> name: the hash of a configuration, or of a rule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def identity(content: Mapping[str, Any]) -> str:
    """Hash plain data: canonical JSON (sorted keys, no spaces, no NaN), SHA-256."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()

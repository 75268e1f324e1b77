"""Where things lie, and the YAML files that say what to run: strict reading, budgets of the tiers."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dynarep.errors import UserError, explain, invalid, unknown
from dynarep.schema import TIERS, TierFile, budget_model


@cache
def checkout() -> Path:
    """Return the checkout that this package runs from: where the lock and git are."""
    return Path(__file__).resolve().parents[2]


def home() -> Path:
    """Return the folder that holds `experiments/`, `results/` and `figures/`: $DYNAREP_HOME, else the checkout."""
    return Path(os.environ.get("DYNAREP_HOME") or checkout())


def experiments() -> Path:
    """Return the folder of experiment files; UserError if there is none."""
    folder = home() / "experiments"
    if not folder.is_dir():
        raise UserError(f"{folder}: no experiment files. Run from a checkout, or set DYNAREP_HOME to one.")
    return folder


_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where there is one, is ten times as fast


class _Loader(_Safe):  # type: ignore[misc]
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            fault = None if isinstance(key, yaml.ScalarNode) else "a key must be a word"
            if fault is None and key.value in seen:
                fault = f"key '{key.value}' is given twice"
            if fault:
                raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; UserError names file and line."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not readable as YAML: {getattr(error, 'problem', None) or error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of keys to values.")
    return data


def tier_in(folder: Path, tier: str) -> TierFile:
    """Read <folder>/tiers/<tier>.yaml, once while it does not change; UserError lists its faults."""
    path = folder / "tiers" / f"{tier}.yaml"
    key = (path, path.stat().st_mtime_ns if path.exists() else 0)
    if key not in _TIER_CACHE:
        data = read_yaml(path)
        try:
            file = TierFile.model_validate(data)
        except ValidationError as error:
            raise invalid(path, explain(error, TierFile)) from None
        try:
            budget_model().model_validate(file.budget)
        except ValidationError as error:
            raise invalid(path, explain(error, budget_model(), "budget.")) from None
        if file.tier != tier:
            raise invalid(path, [f"tier: is '{file.tier}', but the file is called {path.name}."])
        _TIER_CACHE[key] = file
    return _TIER_CACHE[key]


_TIER_CACHE: dict[tuple[Path, int], TierFile] = {}


def tier_file(tier: str) -> TierFile:
    """Return a tier's file; UserError for an unknown tier."""
    if tier not in TIERS:
        raise unknown("tier", tier, TIERS, "Pass --tier with one of them.")
    return tier_in(experiments(), tier)

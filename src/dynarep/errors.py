"""Errors for people: what is wrong where, what was allowed, what to type. The command line exits with 2."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


class UserError(Exception):
    """Something the user can put right; the message is complete and needs no traceback."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" if a word like it is allowed, and the allowed words."""
    names = sorted(allowed)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Allowed: {', '.join(names) or 'nothing'}."


def unknown(what: str, word: str, allowed: Iterable[str], then: str = "") -> UserError:
    """Return the error for a name that does not exist."""
    return UserError(f"unknown {what} '{word}'.{nearest(word, allowed)}" + (f" {then}" if then else ""))


def _inner_models(annotation: Any) -> list[type[BaseModel]]:
    """Find the pydantic models inside Optional, Annotated, tuple, list and dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, tuple, list, dict):
        return [model for argument in get_args(annotation) for model in _inner_models(argument)]
    return []


def _allowed_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that were allowed where an unknown one stands; "~Name" chooses among several models."""
    models = [model]
    for part in map(str, location[:-1]):
        if part.startswith("~"):
            models = [inner for inner in models if inner.__name__ == part[1:]]
        elif models and part in models[0].model_fields:
            models = _inner_models(models[0].model_fields[part].annotation)
    return sorted(models[0].model_fields) if models else []


def explain(error: ValidationError, model: type[BaseModel], prefix: Callable[[str], str] | str = "") -> list[str]:
    """Turn a pydantic error into one line per fault: dotted path, what is wrong, what was allowed.

    `prefix` stands before the path; as a function, of the path's first key.
    """
    lines = []
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"] if not str(part).startswith("~")]
        before = prefix if isinstance(prefix, str) else prefix(parts[0] if parts else "")
        path = (before + ".".join(parts)).removesuffix(".").removesuffix(": ")
        if fault["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key.{nearest(str(fault['loc'][-1]), _allowed_at(model, fault['loc']))}")
        elif fault["type"] == "missing":
            lines.append(f"{path}: is missing.")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            got = "" if isinstance(fault["input"], dict) else f", got {fault['input']!r:.80}"
            lines.append(f"{path}: {message[0].lower()}{message[1:]}{got}.")
    return lines


def invalid(file: Path | str, faults: Iterable[str]) -> UserError:
    """Return the error for a file with faults, all of them at once."""
    return UserError(f"{file} is not valid:\n" + "\n".join(f"  {fault}" for fault in faults))

"""What a run's manifest must say to be read at all. Strict types; keys that older code did not write may be absent."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dynarep.errors import explain
from dynarep.untrusted import UntrustedError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=500)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0, lt=1e12, allow_inf_nan=False)]
Fact = Text | bool | int | float | None


def _a_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without its zone")
    return text


Time = Annotated[Text, AfterValidator(_a_time)]


class _Part(BaseModel):
    """Other keys are let through: later code may say more."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Code(_Part):
    """Which code made the run."""

    fingerprint: Text
    commit: Text | None = None
    dirty: bool | None = None


class Cost(_Part):
    """What the last process of the job spent."""

    wall_s: Seconds = 0.0
    cpu_s: Seconds = 0.0
    env_wait_s: Seconds = 0.0  # simulating, or waiting for those who do
    env_cpu_s: Seconds = 0.0  # of processes that simulated for this one
    peak_mib: Count = 0
    seeds_in_job: Annotated[int, Field(ge=1, lt=2**31)] = 1


class Stop(_Part):
    """A process of the job that was stopped: where, what it had spent, when it began and stopped."""

    stopped_at: Count
    wall_s: Seconds = 0.0
    cpu_s: Seconds = 0.0
    started: Time | None = None
    at: Time | None = None


class Size(_Part):
    """A file that the manifest vouches for."""

    sha256: Text
    bytes: Count
    rows: Count | None = None


class Manifest(_Part):
    """manifest.json.

    Attributes:
        block: seed -> SHA-256 of its metrics, of all seeds trained by the same process; None where not recorded.
        claims: claim -> hash of its rule when the run was made; None where not recorded.
        started, written: when the last process began and when it wrote; None where not recorded.
    """

    identity: Text
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    config: dict[str, Any]
    code: Code
    lock: Text
    files: dict[str, Size]
    dynarep: Text | None = None
    streams: Text | None = None
    made_for: dict[str, Text] = Field(default_factory=dict)
    versions: dict[str, Text] = Field(default_factory=dict)
    machine: dict[str, Fact] = Field(default_factory=dict)
    cost: Cost = Cost()
    resumed: tuple[Stop, ...] = Field((), strict=False)
    started: Time | None = None
    written: Time | None = None
    claims: dict[str, Text] | None = None
    block: dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], Sha256] | None = None


def check(content: Any, metrics: str) -> Manifest:
    """Return a manifest that vouches for one file, `metrics`.

    Raises:
        UntrustedError: wrong types or missing keys, or files that are not the run's.
    """
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise UntrustedError("malformed", " ".join(explain(error, Manifest))[:400]) from None
    except RecursionError:
        raise UntrustedError("malformed", "is nested too deeply") from None
    if strange := sorted(set(manifest.files) - {metrics}):
        raise UntrustedError("path", f"names a file that is not a run's: {strange[0]!r:.80}. It was not opened.")
    if metrics not in manifest.files:
        raise UntrustedError("malformed", f"files.{metrics}: is missing.")
    return manifest

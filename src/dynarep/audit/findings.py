"""What an audit found, what it looked at, and what it did not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

# kind -> what is wrong; the README's table
KINDS = {
    "missing": "a run, a file of one, a figure, verdicts or a report that should be there is not",
    "unplanned": "a file or folder that no experiment plans, a seed beyond the plan among them",
    "link": "a link or a special file in place of a file or folder; it was not followed",
    "size": "a file larger than any real one, or too many files; it was not read",
    "malformed": "not what dynarep writes: no manifest, no table of numbers, no UTF-8, wrong types, a key twice",
    "path": "a manifest that names files outside its run; they were not opened",
    "hash": "metrics that do not match the hash, size or rows in their manifest",
    "identity": "a run in the place of another: configuration, identity, seed or place do not fit together",
    "duplicate": "two seeds with the same metrics",
    "block": "seeds trained by one process whose manifests contradict each other",
    "rows": "metrics that the protocol cannot have recorded: cut short, at other times, under other names",
    "diverged": "numbers that are not finite in a run that says it did not diverge",
    "time": "times, costs or the history of stops contradict each other, or lie in the future",
    "provenance": "made by other code or packages than this checkout's, or by versions that its lock does not have",
    "mixture": "code, packages, devices, kernels, threads or compiled updates that differ within one figure",
    "rule": "a claim's rule that is younger than the runs it judges",
    "figure": "a figure's CSV that does not follow from the runs",
    "image": "a figure's image that does not follow from its CSV",
    "verdict": "verdicts that do not follow from the runs",
    "report": "a report that does not follow from runs, figures and verdicts",
    "rerun": "metrics that training the same seed again does not give",
}


@dataclass(frozen=True)
class Finding:
    """Something that does not hold; `path` is relative to what is audited."""

    path: str
    kind: str
    message: str

    def data(self) -> dict[str, str]:
        """Return plain data for JSON."""
        return {"path": self.path, "kind": self.kind, "message": self.message}


@dataclass
class Audit:
    """Findings as they come; `rerun` says what training again showed."""

    findings: list[Finding] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    not_checked: list[str] = field(default_factory=list)
    tiers: list[str] = field(default_factory=list)
    rerun: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything holds that was checked."""
        return not self.findings

    def find(self, path: PurePath | str, kind: str, message: str) -> None:
        """Note a finding, once. What is written in results may be anything: only printable characters pass."""
        assert kind in KINDS, kind
        finding = Finding(printable(str(path)), kind, printable(message))
        if finding not in self.findings:
            self.findings.append(finding)

    def skip(self, what: str) -> None:
        """Note what was not checked."""
        self.not_checked.append(printable(what))

    def data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "ok": self.ok,
            "tiers": self.tiers,
            "checked": dict(self.checked),
            "not_checked": self.not_checked,
            "findings": [finding.data() for finding in self.findings],
            **({"rerun": self.rerun} if self.rerun else {}),
        }


def printable(text: str) -> str:
    """Return text for a terminal: control characters and broken names as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)

"""Results, and what may be done to them: every change with the kind of finding that must come of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynarep import dag
from dynarep.experiment import load_all

TIER = "smoke"
HEADER = b"agent_step,frame,update,metric,value\n"


@dataclass
class Home:
    """A copy to change; runs by arm and seed."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "results" / "runs"

    def run(self, experiment: str = "D2", arm: int = 0, seed: int = 0) -> Path:
        jobs = next(e for e in load_all() if e.spec.id == experiment).jobs(TIER)
        return self.runs / jobs[arm].config.folder() / f"seed={seed}"

    def figure(self, kind: str, experiment: str = "D2") -> Path:
        return self.root / "figures" / TIER / "beyond" / f"{experiment}.{kind}"


def manifest_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return content


def edit(run: Path, change: Callable[[dict[str, Any]], object], both: bool = True) -> None:
    """Change a manifest; with `both`, also that of the seed beside it, which the same process wrote."""
    for folder in sorted(run.parent.glob("seed=*")) if both else [run]:
        content = manifest_of(folder)
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")


def forge(run: Path, change: Callable[[str], str], block: bool = True) -> None:
    """Change metrics and the hash in the run's manifest; with `block`, every hash that there is of them."""
    path = run / "metrics.csv"
    text = change(path.read_bytes().decode())
    assert text != path.read_bytes().decode()
    replace_metrics(run, text.encode())
    if block:
        edit(run, lambda m: m["block"].update({run.name[5:]: hashlib.sha256(text.encode()).hexdigest()}))


def replace_metrics(run: Path, data: bytes) -> None:
    (run / "metrics.csv").write_bytes(data)
    said = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "rows": data.count(b"\n") - 1}
    edit(run, lambda m: m["files"].update({"metrics.csv": said}), both=False)


def value(metric: str, new: str) -> Callable[[str], str]:
    """Return a change of a metric's values."""
    return lambda text: re.sub(rf"(,{re.escape(metric)}),[^\n]*", rf"\1,{new}", text)


def digit(text: str) -> str:
    """Change the last digit of the last value that is a number."""
    last = list(re.finditer(r"\d(?=\n)", text))[-1]
    return text[: last.start()] + str((int(last[0]) + 1) % 10 or 1) + text[last.end() :]


def both_seeds(run: Path, change: Callable[[str], str]) -> None:
    for folder in sorted(run.parent.glob("seed=*")):
        forge(folder, change)


def swap(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def swap_metrics(a: Path, b: Path) -> None:
    one, other = ((run / "metrics.csv").read_bytes() for run in (a, b))
    replace_metrics(a, other)
    replace_metrics(b, one)


def replace_by_link(path: Path) -> None:
    target = _outside(path)
    path.rename(target)
    path.symlink_to(target)


def _outside(path: Path) -> Path:
    root = next(parent for parent in path.parents if parent.name.startswith("copy"))
    folder = root.with_name(f"{root.name}-outside")
    folder.mkdir(exist_ok=True)
    return folder / path.name


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def rehashed(m: dict[str, Any]) -> None:
    m["config"]["agent"]["discount"] = 0.5
    text = json.dumps(m["config"], sort_keys=True, separators=(",", ":"))
    m["identity"] = hashlib.sha256(text.encode()).hexdigest()


def stops(*at: int, wall: float = 0.0) -> Callable[[dict[str, Any]], object]:
    """Return a change: the job was stopped before, at these places."""
    return lambda m: m.update(
        resumed=[
            {"stopped_at": n, "wall_s": wall, "cpu_s": wall, "started": m["started"], "at": m["started"]} for n in at
        ]
    )


def copied_seed(home: Home, seed: int) -> None:
    shutil.copytree(home.run(), home.run(seed=seed))
    edit(home.run(seed=seed), lambda m: m.update(seed=seed), both=False)


def beside(home: Home) -> None:
    """One seed's metrics for both, all hashes put right."""
    one, other = home.run(seed=0), home.run(seed=1)
    forge(other, lambda text: (one / "metrics.csv").read_text())


def without_a_seed(home: Home) -> None:
    lines = home.figure("csv").read_text().splitlines()
    kept = [line for line in lines if not re.match(r"[^,]*,[^,]*,[^,]*,[^,]*,1(\.0)?,", line)]
    assert len(kept) < len(lines)
    home.figure("csv").write_text("\n".join(kept) + "\n")


def verdicts(home: Home, change: Callable[[list[dict[str, Any]]], object]) -> None:
    path = home.runs / "claims" / f"{TIER}.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def replaced(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(text: str, keep: str) -> str:
    """Drop everything from the last line that begins with `keep` on."""
    lines = text.splitlines()
    return "\n".join(line for line in lines if not line.startswith(keep)) + "\n"


def last_time(text: str) -> str:
    """Drop what was recorded last."""
    return cut(text, text.splitlines()[-1].split(",")[0] + ",")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def unlink_tree(path: Path) -> None:
    shutil.rmtree(path)


LATER, EARLIER = "2099-01-01T00:00:00+00:00", "2001-01-01T00:00:00+00:00"

# what is done -> kind that it must be found as
MUTATIONS: dict[str, tuple[str, Callable[[Home], object]]] = {
    # runs
    "a digit of a metric, hash left": (
        "hash",
        lambda h: write(h.run() / "metrics.csv", digit((h.run() / "metrics.csv").read_text()).encode()),
    ),
    "a digit of a metric, its hash recomputed": ("block", lambda h: forge(h.run(), digit, block=False)),
    "metrics truncated": (
        "hash",
        lambda h: write(h.run() / "metrics.csv", (h.run() / "metrics.csv").read_bytes()[:-40]),
    ),
    "metrics emptied": ("hash", lambda h: write(h.run() / "metrics.csv", b"")),
    "metrics missing": ("missing", lambda h: (h.run() / "metrics.csv").unlink()),
    "manifest missing": ("missing", lambda h: (h.run() / "manifest.json").unlink()),
    "manifest emptied": ("malformed", lambda h: write(h.run() / "manifest.json", b"")),
    "manifest truncated": (
        "malformed",
        lambda h: write(h.run() / "manifest.json", (h.run() / "manifest.json").read_bytes()[:300]),
    ),
    "a run removed": ("missing", lambda h: unlink_tree(h.run())),
    "an arm removed": ("missing", lambda h: unlink_tree(h.run("S", 2).parent)),
    "all runs and figures of an experiment removed": (
        "missing",
        lambda h: [unlink_tree(p) for p in h.runs.glob("linear_td")] + [h.figure(k, "S").unlink() for k in dag.FORMATS],
    ),
    "a row dropped, every hash recomputed": ("rows", lambda h: forge(h.run(), lambda t: cut(t, t.splitlines()[3]))),
    "last measurement of a seed dropped, every hash recomputed": ("rows", lambda h: forge(h.run(), last_time)),
    "both seeds cut short, every hash recomputed": ("rows", lambda h: both_seeds(h.run(), last_time)),
    "a metric renamed in both seeds, every hash recomputed": (
        "rows",
        lambda h: both_seeds(h.run(), lambda t: t.replace("eval/length", "eval/luck")),
    ),
    "a row twice in both seeds, every hash recomputed": (
        "rows",
        lambda h: both_seeds(h.run(), lambda t: t + t.splitlines()[-1] + "\n"),
    ),
    "the final return raised, every hash recomputed": ("rows", lambda h: forge(h.run(), value("return/final", "999"))),
    "steps renumbered in both seeds, every hash recomputed": (
        "rows",
        lambda h: both_seeds(h.run(), lambda t: re.sub(r"(?m)^(\d+),(\d+),", lambda m: f"{m[1]},{int(m[2]) + 1},", t)),
    ),
    "two seeds with the same content": ("duplicate", beside),
    "two seeds swapped": ("identity", lambda h: swap(h.run(seed=0), h.run(seed=1))),
    "two arms swapped": ("identity", lambda h: swap(h.run(arm=0), h.run(arm=1))),
    "metrics of two arms swapped, their hashes too": ("block", lambda h: swap_metrics(h.run(arm=0), h.run(arm=1))),
    "a seed beyond the plan added": ("unplanned", lambda h: copied_seed(h, 7)),
    "another seed in a manifest": ("identity", lambda h: edit(h.run(), lambda m: m.update(seed=1), both=False)),
    "a configuration that does not hash to its identity": (
        "identity",
        lambda h: edit(h.run(), lambda m: m["config"]["agent"].update(discount=0.5)),
    ),
    "a configuration with its identity hashed again": ("identity", lambda h: edit(h.run(), rehashed)),
    "NaN in a run that says it did not diverge, every hash recomputed": (
        "diverged",
        lambda h: forge(h.run(), value("eval/return", "nan")),
    ),
    "divergence erased from both seeds, every hash recomputed": (
        "diverged",
        lambda h: both_seeds(
            h.run(), lambda t: "".join(line for line in t.splitlines(True) if ",diverged," not in line)
        ),
    ),
    "divergence that is neither yes nor no": ("diverged", lambda h: forge(h.run(), value("diverged", "0.5"))),
    "a digit too many, every hash recomputed": (
        "malformed",
        lambda h: forge(
            h.run(), lambda t: t.rstrip("\n") + "0\n" if "." in t.splitlines()[-1] else value("diverged", "0.0")(t)
        ),
    ),
    # provenance
    "code fingerprint of an arm": (
        "mixture",
        lambda h: edit(h.run(), lambda m: m["code"].update(fingerprint="f" * 64)),
    ),
    "code fingerprint of a whole experiment": (
        "provenance",
        lambda h: [edit(h.run("S", arm), lambda m: m["code"].update(fingerprint="f" * 64)) for arm in range(8)],
    ),
    "lock of an arm": ("mixture", lambda h: edit(h.run(), lambda m: m.update(lock="0" * 64))),
    "version of NumPy of an arm": ("mixture", lambda h: edit(h.run(), lambda m: m["versions"].update(numpy="1.0"))),
    "kernels of an arm": ("mixture", lambda h: edit(h.run(), lambda m: m["machine"].update(kernels="SSE"))),
    "threads of an arm": ("mixture", lambda h: edit(h.run(), lambda m: m["machine"].update(threads=2))),
    "device of an arm": ("mixture", lambda h: edit(h.run(), lambda m: m["machine"].update(device="cuda"))),
    "kernels that MKL took for an arm": (
        "mixture",
        lambda h: edit(h.run(), lambda m: m["machine"].update(mkl="none")),
    ),
    "an arm that was compiled": ("mixture", lambda h: edit(h.run(), lambda m: m["machine"].update(compiled=True))),
    "an arm with TF32": ("mixture", lambda h: edit(h.run(), lambda m: m["machine"].update(tf32=True))),
    "an arm that was not deterministic": (
        "mixture",
        lambda h: edit(h.run(), lambda m: m["machine"].update(deterministic=False)),
    ),
    "an arm that does not say whether it was compiled": (
        "mixture",
        lambda h: edit(h.run(), lambda m: m["machine"].pop("compiled")),
    ),
    "cost of one seed of a process": (
        "block",
        lambda h: edit(h.run(), lambda m: m["cost"].update(wall_s=0.001), both=False),
    ),
    "a rule of a claim": ("rule", lambda h: edit(h.run(), lambda m: m.update(claims={"D2a": "0" * 16}))),
    "written in the future": ("time", lambda h: edit(h.run(), lambda m: m.update(written=LATER))),
    "written before it began": ("time", lambda h: edit(h.run(), lambda m: m.update(written=EARLIER))),
    "more seconds than passed": ("time", lambda h: edit(h.run(), lambda m: m["cost"].update(wall_s=9e5))),
    "more processor seconds than a thread has": (
        "time",
        lambda h: edit(h.run(), lambda m: m["cost"].update(cpu_s=9e5)),
    ),
    "stops that do not increase": ("time", lambda h: edit(h.run(), stops(20, 10))),
    "a stop after the end": ("time", lambda h: edit(h.run(), stops(10**6))),
    "stopped before it had taken so long": ("time", lambda h: edit(h.run(), stops(10, wall=500.0))),
    # figures, verdicts, report
    "a digit of a figure's CSV": (
        "figure",
        lambda h: write(h.figure("csv"), digit(h.figure("csv").read_text()).encode()),
    ),
    "a seed dropped from a figure's CSV": ("figure", without_a_seed),
    "a figure's CSV emptied": ("figure", lambda h: write(h.figure("csv"), b"")),
    "a number in an SVG": ("image", lambda h: replaced(h.figure("svg"), b"M ", b"M 1")),
    "a byte of a PNG": ("image", lambda h: flipped(h.figure("png"))),
    "another figure's PDF": ("image", lambda h: shutil.copy(h.figure("pdf", "S"), h.figure("pdf"))),
    "an image missing": ("missing", lambda h: h.figure("png").unlink()),
    "a figure's CSV missing": ("missing", lambda h: h.figure("csv").unlink()),
    "an image emptied": ("image", lambda h: write(h.figure("svg"), b"")),
    "a figure that nobody planned": ("unplanned", lambda h: shutil.copy(h.figure("svg"), h.figure("svg", "D2b"))),
    "a verdict": ("verdict", lambda h: verdicts(h, lambda rows: rows[0].update(verdict="supported"))),
    "an estimate": ("verdict", lambda h: verdicts(h, lambda rows: rows[0].update(estimate=2.0, low=1.5, high=2.5))),
    "a claim dropped from the verdicts": ("verdict", lambda h: verdicts(h, lambda rows: rows.pop())),
    "verdicts missing": ("missing", lambda h: (h.runs / f"claims/{TIER}.json").unlink()),
    "a word of the report": ("report", lambda h: replaced(h.runs / f"report/{TIER}.html", b"untested", b"supported")),
    "the report missing": ("missing", lambda h: (h.runs / f"report/{TIER}.html").unlink()),
    # what no run is
    "a file added to a run": (
        "unplanned",
        lambda h: write(h.run() / "model.pkl", b"cos\nsystem\n(S'touch /tmp/owned'\ntR."),
    ),
    "a folder added": ("unplanned", lambda h: write(h.runs / "extra" / "notes.txt", b"")),
    "a file beside the verdicts": ("unplanned", lambda h: write(h.runs / "claims" / "best.json", b"[]")),
    "a run's folder is a link": ("link", lambda h: replace_by_link(h.run())),
    "an arm's folder is a link": ("link", lambda h: replace_by_link(h.run().parent)),
    "metrics are a link": ("link", lambda h: replace_by_link(h.run() / "metrics.csv")),
    "a manifest is a link to nothing": (
        "link",
        lambda h: ((h.run() / "manifest.json").unlink(), (h.run() / "manifest.json").symlink_to("nothing")),
    ),
    "a figure is a link": ("link", lambda h: replace_by_link(h.figure("svg"))),
    "the figures' folder is a link": ("link", lambda h: replace_by_link(h.root / "figures" / TIER)),
    "metrics are a pipe": ("link", lambda h: fifo(h.run() / "metrics.csv")),
    "a manifest names a file outside": (
        "path",
        lambda h: edit(
            h.run(), lambda m: m["files"].update({"../../../../../../etc/passwd": m["files"]["metrics.csv"]})
        ),
    ),
    "a manifest names an absolute path": (
        "path",
        lambda h: edit(h.run(), lambda m: m.update(files={"/etc/passwd": m["files"]["metrics.csv"]})),
    ),
    "huge metrics": ("size", lambda h: sparse(h.run() / "metrics.csv", 2**33)),
    "a huge manifest": ("size", lambda h: sparse(h.run() / "manifest.json", 2**33)),
    "a huge figure": ("size", lambda h: sparse(h.figure("svg"), 2**33)),
    "JSON nested without end": ("malformed", lambda h: write(h.run() / "manifest.json", b"[" * 500_000)),
    "a key twice": ("malformed", lambda h: replaced(h.run() / "manifest.json", b'"seed": 0', b'"seed": 1, "seed": 0')),
    "NaN in a manifest": ("malformed", lambda h: replaced(h.run() / "manifest.json", b'"seed": 0', b'"seed": NaN')),
    "a seed that is text": ("malformed", lambda h: edit(h.run(), lambda m: m.update(seed="0"))),
    "a manifest that is a list": ("malformed", lambda h: write(h.run() / "manifest.json", b"[]")),
    "metrics that are no UTF-8, hash recomputed": (
        "malformed",
        lambda h: replace_metrics(h.run(), b"\xff\xfe" + (h.run() / "metrics.csv").read_bytes()),
    ),
    "a ragged table, hash recomputed": (
        "malformed",
        lambda h: replace_metrics(h.run(), (h.run() / "metrics.csv").read_bytes() + b"1,2,3\n"),
    ),
    "a cell without end, hash recomputed": (
        "malformed",
        lambda h: replace_metrics(h.run(), HEADER + b"9" * 200_000 + b",1,1,q,1\n"),
    ),
    "text for a number, hash recomputed": ("malformed", lambda h: replace_metrics(h.run(), HEADER + b"1,1,1,q,high\n")),
    "half a step, hash recomputed": ("malformed", lambda h: replace_metrics(h.run(), HEADER + b"1.5,1,1,q,1\n")),
}

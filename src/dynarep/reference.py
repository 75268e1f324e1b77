"""Committed runs: results/reference holds those of some tiers, so that a fresh clone need not train."""

from __future__ import annotations

import shutil
from pathlib import Path

from dynarep import dag, fingerprint, records
from dynarep.errors import UserError
from dynarep.experiment import load_all
from dynarep.files import checkout, home
from dynarep.schema import TIERS


def keep(tier: str) -> tuple[int, int]:
    """Put a tier's runs in place of the committed ones, and take away those that no tier plans any more.

    Returns:
        The number of runs copied and of folders taken away.

    Raises:
        UserError: a run is missing, cannot be believed, or was not made by this code; nothing is copied then.
    """
    jobs = dag.load(tier)[1]
    runs, kept = (home() / "results" / source for source in dag.SOURCES)
    folders: list[Path] = []
    for job in jobs:
        ours = (fingerprint.of_parts(job.config.agent, job.config.protocol), fingerprint.of_lock(checkout()))
        for seed, folder in zip(job.seeds, job.folders(), strict=True):
            records.read(runs / folder, job.config, seed)
            if records.made_by(runs / folder) != ours:
                raise UserError(
                    f"{runs / folder}: was made by other code or packages. Type `make reproduce TIER={tier}`."
                )
            folders.append(folder)
    planned = {folder for e in load_all() for name in TIERS for job in e.jobs(name) for folder in job.folders()}
    gone = [
        path.parent
        for path in sorted(kept.glob(f"*/*/*/*/{records.MANIFEST}"))
        if path.parent.relative_to(kept) not in planned
    ]
    for folder in gone:
        shutil.rmtree(folder)
    for folder in folders:
        for name in (records.METRICS, records.MANIFEST):
            records.atomic_write(kept / folder / name, (runs / folder / name).read_bytes())
    for folder in sorted((path for path in kept.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    return len(folders), len(gone)

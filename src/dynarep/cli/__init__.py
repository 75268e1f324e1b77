"""The command line: list | plan | train | figure | claims | report | audit | reference | bench.

Bad input ends with one message and exit code 2; nothing is written. Simulators, PyTorch and matplotlib are imported by
the commands that need them, so that the rest answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import tyro

from dynarep import scheduler
from dynarep.cli import audit, bench, overview, results, train
from dynarep.envs import EnvError
from dynarep.errors import UserError, unknown

COMMANDS: dict[str, Callable[..., None]] = {
    "list": overview.list_,
    "plan": overview.plan,
    "train": train.train,
    "figure": results.figure,
    "claims": results.claims,
    "report": results.report,
    "audit": audit.audit,
    "reference": results.reference,
    "bench": bench.bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` default to the process's own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    scheduler.watch()
    try:
        if given and not given[0].startswith("-") and given[0] not in COMMANDS:
            raise unknown("command", given[0], COMMANDS, "`dynarep --help` explains them.")
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="dynarep",
            description="Do two papers on model-generated data in reinforcement learning hold up? Start with "
            "`make reproduce`; `dynarep list` shows what there is, `dynarep plan` what it costs.",
            args=given,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (UserError, EnvError) as error:
        print(f"dynarep: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(0) from None

"""Set the compiler up before many jobs start at once: `python -m dynarep.warm`, called where a tier compiles.

It tries the compiler, or says what is missing before anything runs, and leaves behind what all compiled jobs share: the
headers and what the processor can do. Each update's own code is compiled by the first job that needs it; hardly two
variants of a tier share one, and those that do find it in the same folder.
"""

from __future__ import annotations

import sys

from dynarep import process, run
from dynarep.errors import UserError


def main() -> None:
    """Try the compiler; exit code 2 with a message if it does not work."""
    try:
        process.settle(compiled=True, kept=run.compiled_folder())
    except UserError as error:
        print(f"dynarep: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

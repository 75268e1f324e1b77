"""`python -m dynarep`."""

from dynarep.cli import main

main()

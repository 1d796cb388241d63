"""`python -m rlgf`."""

from rlgf.cli import main

main()

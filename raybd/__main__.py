"""`python -m raybd`."""

from raybd.cli import main

main()

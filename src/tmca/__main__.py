"""`python -m tmca` is `tmca`."""

from tmca.cli import main

main()

"""`python -m vitq` is `vitq`."""

from vitq.cli.app import main

main()

"""`python -m cbq` is `cbq`."""

from cbq.cli import main

main()

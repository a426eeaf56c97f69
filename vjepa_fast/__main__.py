"""`python -m vjepa_fast` is the command `vjepa-fast`."""

from vjepa_fast.cli.main import main

main()

"""`python -m vjepa_fast.train.report DIR`: the page about a run."""

from vjepa_fast.train.report.run_report import main

main()

"""`python -m vjepa_fast.train.report DIR`: writes the report of a run."""

from vjepa_fast.train.report.run_report import main

main()

"""The HTML report of a run, and the run.json it is made from."""

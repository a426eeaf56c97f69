"""The page about a run, and the record it is made from."""

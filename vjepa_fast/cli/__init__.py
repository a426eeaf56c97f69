"""The command `vjepa-fast`: one file a verb."""

"""The sections of a config, a file for each subject; vjepa_fast.config.schema puts them together."""

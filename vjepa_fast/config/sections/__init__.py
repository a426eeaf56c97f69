"""The sections of a config, one file a subject; vjepa_fast.config.schema combines them."""

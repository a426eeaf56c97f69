"""The reference's live modules as fast ones that share their parameters."""

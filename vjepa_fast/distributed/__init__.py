"""Several processes: finding each other, sharing a model, agreeing to stop, and noticing a hang."""

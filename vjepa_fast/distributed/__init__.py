"""Several processes: how they find each other, share a model, agree to stop, and notice that one hangs."""

"""AdamW with the EMA of the target encoder, its split over processes, and the schedules."""

"""AdamW with the moving average of the target encoder, its split over processes, and the schedules."""

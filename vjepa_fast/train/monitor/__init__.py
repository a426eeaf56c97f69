"""What a run says while it trains: metrics, health, progress, warnings."""

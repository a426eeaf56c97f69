"""Using a model: features and predictions, of clips in memory and of videos."""

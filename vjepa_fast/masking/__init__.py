"""What is hidden and what is predicted: rules, samplers, and the packed batch of masks."""

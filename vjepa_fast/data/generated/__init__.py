"""Videos that the package makes itself, with labels."""

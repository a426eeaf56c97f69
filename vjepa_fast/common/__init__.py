"""What every other part stands on: errors, random numbers, files, the machine. Imports nothing of the package."""

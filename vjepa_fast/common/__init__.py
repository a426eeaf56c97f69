"""Foundations of every other part: errors, random numbers, files, the machine. Imports no other part."""

"""Labelled videos that the package generates."""

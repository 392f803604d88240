"""Measurements: a benchmark verifies its output in the same run, or prints no figure."""

"""Measurements: each benchmark verifies its output in the same run and prints no figure when that fails."""

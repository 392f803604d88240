"""Models that the loop can drive."""

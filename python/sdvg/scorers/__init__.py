"""Rewards for decoded frames."""

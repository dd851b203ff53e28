"""Prompt tuning: its config, and the virtual tokens that stand in a model's prefix."""

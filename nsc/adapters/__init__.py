"""Adapters: reading PEFT folders, matching them to a base, stacking them, putting them into a model."""

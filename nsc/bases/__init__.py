"""The base model: its config, loading, structure, module names and weights."""

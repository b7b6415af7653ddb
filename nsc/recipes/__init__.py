"""Which method merges what: names, settings, spaces, and the updates that a recipe makes."""

"""Scoring merges on labelled rows, searching scales, comparing methods."""

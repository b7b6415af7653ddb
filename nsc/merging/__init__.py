"""The main job: `merge` and `apply`."""

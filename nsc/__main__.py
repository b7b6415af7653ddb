"""``python -m nsc``."""

from nsc.cli.merge_command import app

app()

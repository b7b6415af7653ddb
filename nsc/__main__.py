"""``python -m nsc``."""

from nsc.cli import app

app()

"""The command line: each command a few lines over the Python API. ``app`` is the entry point of ``nsc``."""

import typer

from nsc.cli.compare_command import compare
from nsc.cli.inspect_command import inspect, methods
from nsc.cli.merge_command import apply, merge
from nsc.cli.plan_command import plan, profile
from nsc.cli.push_command import push

app = typer.Typer(
    name="nsc",
    help="Merge LoRA adapters by Null-Space Compression, without labels, and prove what was written.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (merge, apply, push, methods, inspect, plan, profile, compare):
    app.command()(command)

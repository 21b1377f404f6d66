"""The command line: typer commands over the library, and nothing else."""

from rankscope.cli.app import main

__all__ = ["main"]

"""The command line: typer commands over the library, and nothing else."""

import logging

from rankscope.cli.app import main

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises on import, and whenever a product casts

__all__ = ["main"]

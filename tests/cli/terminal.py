"""The command line, called in this process."""

from typer.testing import CliRunner

from rankscope.cli import app


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Exit status, output and errors of `rankscope ARGUMENTS`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr

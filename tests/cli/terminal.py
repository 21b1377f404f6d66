"""The command line, called in this process."""

from typer.testing import CliRunner

from rankscope.cli import app


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Exit status, output and errors of `rankscope ARGUMENTS`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def invoke_code(*arguments: object) -> tuple[int, str, str]:
    """`invoke` on a study outside the working directory that brings code, which is said and then left out of the errors."""
    status, text, errors = invoke(*arguments, "--allow-code")
    said, _, rest = errors.partition("\n")
    assert "brings code, which runs here" in said
    return status, text, rest

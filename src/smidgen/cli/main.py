"""The frame of the command line: which commands there are, and how an error is told.

A command is a module of this room that holds a function of the same name; the function's signature gives the options
and its docstring the help. Listing the commands reads the first lines of the docstrings from the source, so that it
imports neither the commands nor torch.
"""

from __future__ import annotations

import ast
import importlib
import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import smidgen
from smidgen import threads
from smidgen.errors import SmidgenError, did_you_mean

COMMANDS = (
    "train",
    "check",
    "plan",
    "evaluate",
    "score",
    "chat",
    "generate",
    "merge",
    "convert",
    "extract",
    "verify",
    "lineage",
    "flow",
    "methods",
    "inspect",
    "readout",
    "bench",
)


def summary(name: str) -> str:
    """Answer the first line of a command's docstring, without importing the command."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise LookupError(f"cli/{name}.py holds no function '{name}'")


class _Commands(TyperGroup):
    """A group whose commands are imported when one of them runs or shows its own help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        return TyperCommand(cmd_name, help=summary(cmd_name)) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] not in COMMANDS:
            ctx.fail(f"no command '{args[0]}'{did_you_mean(args[0], COMMANDS)}")
        return args[0], _load(args[0]), args[1:]


def _load(name: str) -> Any:
    """Import a command, settle the threads that it will compute with, and answer it as typer's command object."""
    app, looked = typer.Typer(add_completion=False, rich_markup_mode=None), threads.Usage.now()
    app.command(name)(getattr(importlib.import_module(f"smidgen.cli.{name}"), name))
    if "torch" not in sys.modules:  # it reads the environment once
        threads.settle(looked.free_since() if looked else None)
    return typer.main.get_command(app)


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True, rich_markup_mode=None)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"smidgen {smidgen.__version__}")
        raise typer.Exit


@app.callback(epilog="Any command takes --debug: an error then shows where in the code it arose.")
def _frame(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Fine-tune a language model by training a smidgen of it, with proof that it worked."""


def main() -> None:
    """Run the command that the arguments name, and leave with its exit code.

    0: done. 1: a failure, or a refusal. 2: the request itself is wrong, and nothing was changed or spent.
    3: a guard stopped the training. 4: a gate of a flow does not hold. 130: interrupted.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8")  # on Windows, files and pipes would lose what its code page lacks
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        typer.main.get_command(app)(arguments, prog_name="smidgen")
    except SmidgenError as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)

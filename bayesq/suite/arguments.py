"""Command lines: of the suite's modules, described by the text at their head, and of the program, as Hydra reads it."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser

import bayesq
from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError


def module_parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring as it stands: its first paragraph, then the arguments, then the rest.

    Args:
        module: as in `python -m bayesq.suite.MODULE`.
        text: the docstring.
    """
    summary, _, usage = (text or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m bayesq.suite.{module}",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def exit_with(error: Exception) -> NoReturn:
    """End a program with one line about the error and exit code 1."""
    sys.exit(f"error: {one_line(str(error))}")


def command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Hydra's reading of the command line, with errors that leave by exception instead of a usage text."""
    parser = argparse.ArgumentParser(parents=[get_args_parser()], add_help=False, conflict_handler="resolve")
    parser.add_argument("--version", action="version", version=f"bayesq {bayesq.__version__}")

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{one_line(message)} (--help lists what there is)")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(list(argv))

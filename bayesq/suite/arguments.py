"""Argument parsers of the suite's modules and of the program, which extends Hydra's parser."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser

import bayesq
from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError


def module_parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m bayesq.suite.MODULE`, with the module's docstring `text` as its help."""
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
    """Read the command line with Hydra's parser; UserError where Hydra would print its usage text."""
    parser = argparse.ArgumentParser(parents=[get_args_parser()], add_help=False, conflict_handler="resolve")
    parser.add_argument("--version", action="version", version=f"bayesq {bayesq.__version__}")

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{one_line(message)} (--help lists the options)")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(list(argv))

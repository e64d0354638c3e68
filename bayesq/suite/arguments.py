"""Command lines of the suite's modules, described by the text at their head."""

import argparse


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

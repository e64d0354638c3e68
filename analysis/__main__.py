"""`python -m analysis RESULTS`: the main table of a results folder as Markdown."""

import argparse
import sys

from analysis import load_runs, main_table


def main() -> None:
    """Print the table, or one line on stderr and exit code 1 where there is nothing to show."""
    parser = argparse.ArgumentParser(prog="python -m analysis", description=__doc__)
    parser.add_argument("results", help="a results folder, such as results/")
    source = parser.parse_args().results
    try:
        runs = load_runs(source)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    if runs.empty:
        sys.exit(f"error: no finished run in {source}")
    table = main_table(runs).rename(columns=lambda bits: f"{bits:g} bit")
    print("Primary metric in percent / KL to full precision in nats, mean over n seeds.\n")
    print(table.reset_index().to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()

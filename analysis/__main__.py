"""`python -m analysis RESULTS [--cost | --glue]`: the main table of a results folder, costs or GLUE scores."""

import argparse
import sys

from analysis import cost_table, glue_table, load_runs, main_table


def main() -> None:
    """Print the table, or one line on stderr and exit code 1 where there is nothing to show."""
    parser = argparse.ArgumentParser(prog="python -m analysis", description=__doc__)
    parser.add_argument("results", help="a results folder, such as results/")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cost", action="store_true", help="seconds of the stages, and multiples of GPTQ's")
    kind.add_argument("--glue", action="store_true", help="means over the tasks of GLUE, and which are missing")
    arguments = parser.parse_args()
    source = arguments.results
    try:
        runs = load_runs(source)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    if runs.empty:
        sys.exit(f"error: no finished run in {source}")
    if arguments.cost:
        print("Seconds, medians over n seeds; x: multiples of GPTQ's, statistics included.\n")
        print(cost_table(runs).reset_index().to_markdown(index=False, floatfmt=".2f"))
        return
    if arguments.glue:
        try:
            scores = glue_table(runs)
        except ValueError as error:
            sys.exit(f"error: {error} in {source}")
        print(
            "Scores times 100, means over n seeds; a task's score is the mean of its metrics, GLUE that of the tasks.\n"
        )
        numbers = scores.select_dtypes("float").columns
        scores[numbers] = scores[numbers].map(lambda score: "" if score != score else f"{score:.2f}")
        print(scores.reset_index().to_markdown(index=False, disable_numparse=True))
        return
    table = main_table(runs).rename(columns=lambda bits: f"{bits:g} bit")
    print("Primary metric in percent / KL to full precision in nats, mean over n seeds.\n")
    print(table.reset_index().to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()

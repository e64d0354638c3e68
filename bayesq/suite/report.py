"""`python -m bayesq.suite.report` starts `analysis.report`: an HTML page of results, or a Report in W&B.

The report itself is in analysis/, because its numbers are those of the tables there. analysis/ imports the suite and is
not in the installed package, so this module loads it only when it is run.
"""

import sys
from importlib import import_module
from importlib.util import find_spec


def main() -> None:
    """Run the command of analysis.report; one line and exit code 1 if there is no folder analysis/."""
    if find_spec("analysis") is None:
        sys.exit("error: the report needs the folder analysis/ of the repository: run it there, or extend PYTHONPATH")
    import_module("analysis.report.__main__").main()


if __name__ == "__main__":
    main()

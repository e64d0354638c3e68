"""Run one quantization experiment, or many with `-m`; `python run.py --help` lists the choices."""

from bayesq.suite.cli import main

if __name__ == "__main__":
    main()

"""Filters of runs: `dataset=digits`, `method=bayesq,gptq`, `calibration.examples=256`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bayesq.defaults import suggestion
from bayesq.suite.config import flatten, show
from bayesq.suite.errors import UserError
from bayesq.suite.results import PROVENANCE

# Names on the command line that differ from those in a record.
ALIASES = {"bits": "bits/target"}
# Largest number of values that an error lists.
MOST_VALUES = 12
# A comma outside brackets.
COMMA = re.compile(r",(?![^\[{]*[\]}])")


def select(runs: Sequence[Mapping[str, Any]], where: Sequence[str]) -> list[dict[str, Any]]:
    """The runs that fit every filter; for runs without a result, known keys are compared.

    Args:
        runs: records of `load_runs`.
        where: `KEY=VALUE` or `KEY=VALUE,VALUE`. KEY is one of result.json or of the configuration, as on the command
            line; numbers are compared as numbers.

    Raises:
        UserError: a filter is no key=value, names a key that no run has or a value that no finished run has, or no
            finished run is left.
    """
    facts = [_facts(run) for run in runs]
    finished = [flat for run, flat in zip(runs, facts, strict=True) if run["status"] == "finished"]
    fits = [True] * len(facts)
    for text in where:
        key, values = _parsed(text)
        known = sorted({name for flat in facts for name in flat})
        if key not in known:
            raise UserError(f"{text}: no run has the key '{key}'{_nearest(key, known)}")
        had = {show(flat[key]) for flat in finished if key in flat}
        for value in values:
            if not any(_fits(flat, key, value) for flat in finished):
                raise UserError(f"{text}: no finished run has {key}={value}{_rather(value, had)}")
        fits = [
            keep and any(_fits(flat, key, value) for value in values) for keep, flat in zip(fits, facts, strict=True)
        ]
    chosen = [dict(run) for run, keep in zip(runs, fits, strict=True) if keep]
    if not any(run["status"] == "finished" for run in chosen):
        raise UserError(f"no finished run has all of {' '.join(where)}")
    return chosen


def _parsed(text: str) -> tuple[str, list[str]]:
    key, sign, values = text.partition("=")
    if not sign or not key or not values:
        raise UserError(f"'{text}' is no filter: write key=value, such as method=bayesq,gptq")
    return key, COMMA.split(values)


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """The flat keys of a run, and those of its configuration that do not clash; an axis has its name as value."""
    config = run.get("config")
    flat = flatten(config) if isinstance(config, Mapping) else {}
    facts = {key.removesuffix(".name"): value for key, value in flat.items()}
    facts |= {key: value for key, value in run.items() if key not in PROVENANCE}
    facts |= {name: run[key] for name, key in ALIASES.items() if key in run}
    return facts


def _fits(facts: Mapping[str, Any], key: str, text: str) -> bool:
    if key not in facts:
        return False
    value = facts[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    shown = show(value)
    return text == shown or ((value is None or isinstance(value, bool)) and text.lower() == shown)


def _rather(value: str, had: set[str]) -> str:
    """Existing values, for an error about a value that no run has."""
    names = sorted(had, key=_order)
    more = f" and {len(names) - MOST_VALUES} others" if len(names) > MOST_VALUES else ""
    near = suggestion(value, [name for name in names if not name.replace(".", "").isdigit()])
    return f"{near or '.'} There is {', '.join(names[:MOST_VALUES])}{more}" if names else ""


def _nearest(key: str, known: Sequence[str]) -> str:
    return suggestion(key, known) or ": give one of result.json or of the configuration"


def _order(text: str) -> tuple[float, str]:
    """Numbers by size, then words."""
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text

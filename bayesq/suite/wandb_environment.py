"""W&B's environment variables: how the suite uses them.

Mode, project, entity, group, job type and name replace the suite's defaults; a key on the command line replaces them.
Tags are added to the suite's tags. The client's files lie in WANDB_DIR. Variables that would log several runs as one
W&B run are not used; `remarks` reports this. `decided` hides all these variables from W&B's client, because it logs
nothing if it rejects the value of one of them. The client sees all others.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# The suite's name for each mode that the client knows.
MODES = {
    **dict.fromkeys(("online", "run", "shared"), "online"),
    **dict.fromkeys(("offline", "dryrun"), "offline"),
    "disabled": "disabled",
}
ON = ("1", "true", "t", "yes", "y", "on")
SWEEP = "WANDB_SWEEP_ID"
# A run's W&B id is its run id, and a repeated run replaces the W&B run.
UNUSED = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")
# A sweep agent sets these. They tell the client which run of the sweep this process is.
OF_AN_AGENT = ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID")
LABELS = ("WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_NAME", "WANDB_TAGS")
DECIDED = ("WANDB_MODE", "WANDB_DISABLED", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DIR", *LABELS, *UNUSED)


def value(name: str) -> str | None:
    """The value of an environment variable; None if it is not set or blank."""
    return os.environ.get(name, "").strip() or None


def under_agent() -> bool:
    """Whether the agent of a W&B sweep started this process."""
    return value(SWEEP) is not None


def default(key: str, fallback: Any) -> Any:
    """The default of wandb.<key>: the value of its variable, else `fallback`. It resolves ${wandb:key,fallback}.

    Under a sweep agent the default mode is online, because the agent sees only online runs.
    """
    if key == "mode":
        return _mode() or ("online" if under_agent() else fallback)
    return value(f"WANDB_{key.upper()}") or fallback


def _mode() -> str | None:
    """The suite's name of the mode in the environment; None if there is none or it is unknown."""
    if (value("WANDB_DISABLED") or "").lower() in ON:
        return "disabled"
    return MODES.get((value("WANDB_MODE") or "").lower())


def remarks(tracking: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each variable that is set but not used, and for what W&B will lack.

    `tracking` has the resolved `wandb` node of each job.
    """
    return list(dict.fromkeys(line for settings in tracking for line in _remarks(settings)))


def _remarks(settings: Mapping[str, Any]) -> Iterator[str]:
    mode, asked, named = settings["mode"], _mode(), value("WANDB_MODE")
    if asked is None and named:
        yield f"WANDB_MODE={named} is none of online, offline, disabled: wandb.mode={mode} is used"
    if asked is not None and asked != mode:
        variable = "WANDB_MODE" if MODES.get((named or "").lower()) == asked else "WANDB_DISABLED"
        yield f"wandb.mode={mode} is used, not {variable}={value(variable)}"
    if settings.get("log_artifact") and mode == "offline":
        left_out = "inputs and no registry link" if settings.get("registry") else "inputs"
        again = "python -m bayesq.suite.relog RESULTS --mode online --again adds them"
        yield f"wandb.log_artifact=true: an offline run has the packed file, but no {left_out}; {again}"
    if under_agent() and mode != "online":
        yield f"wandb.mode={mode}: the sweep agent does not learn the outcome of this job and may start it again"
    if under_agent() or mode == "disabled":
        return
    for key in ("project", "entity"):
        variable = f"WANDB_{key.upper()}"
        if value(variable) not in (None, settings[key]):
            yield f"wandb.{key}={settings[key]} is used, not {variable}={value(variable)}"
    for variable in filter(value, UNUSED):
        yield f"{variable}={value(variable)} is not used: a run's W&B id is its run id, and a repeated run replaces it"


@contextmanager
def decided() -> Iterator[None]:
    """Hide the variables in DECIDED from the client inside the block."""
    names = [name for name in DECIDED if not (under_agent() and name in OF_AN_AGENT)]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)

"""W&B's environment variables: what each of them decides, and a line for each that is not used.

Project, entity, group, job type and name from the environment replace the suite's defaults. Tags are added. WANDB_DIR
is the folder of the client's files. A key on the command line comes first. Variables that would log several runs as
one are not used. `remarks` says what is not used. The client reads none of these variables itself (`decided`), because
it would not log at all where it refuses a value. It reads all others.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# The client's names of its modes, and the suite's name for each.
MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
ON = ("1", "true", "t", "yes", "y", "on")
SWEEP = "WANDB_SWEEP_ID"
# a run's W&B id is its run id, and a repeated run replaces its record
UNUSED = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")
# The agent sets these to tell the client which run of which sweep a job is.
OF_AN_AGENT = ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID")
DECIDED = (
    "WANDB_MODE",
    "WANDB_DISABLED",
    "WANDB_PROJECT",
    "WANDB_ENTITY",
    "WANDB_RUN_GROUP",
    "WANDB_JOB_TYPE",
    "WANDB_NAME",
    "WANDB_TAGS",
    "WANDB_DIR",
    *UNUSED,
)


def value(name: str) -> str | None:
    """The value of an environment variable; None where it is not set or blank."""
    return os.environ.get(name, "").strip() or None


def under_agent() -> bool:
    """Whether an agent of a W&B sweep has started this process."""
    return value(SWEEP) is not None


def default(key: str, fallback: Any) -> Any:
    """What wandb.<key> is unless it is typed; behind ${wandb:key,fallback} in conf/config.yaml.

    Under an agent the mode is online, because an agent learns nothing else.
    """
    if key == "mode":
        return _mode() or ("online" if under_agent() else fallback)
    return value(f"WANDB_{key.upper()}") or fallback


def _mode() -> str | None:
    """The mode that the environment asks for."""
    if (value("WANDB_DISABLED") or "").lower() in ON:
        return "disabled"
    return MODES.get((value("WANDB_MODE") or "").lower())


def remarks(tracking: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each variable that does not decide what its name says.

    Args:
        tracking: the resolved node `wandb` of every job of a command.
    """
    return list(dict.fromkeys(line for settings in tracking for line in _remarks(settings)))


def _remarks(settings: Mapping[str, Any]) -> Iterator[str]:
    """`remarks` on one job."""
    mode, asked, named = settings["mode"], _mode(), value("WANDB_MODE")
    if asked is None and named:
        yield f"WANDB_MODE={named} is none of online, offline, disabled: wandb.mode={mode} is used"
    if asked is not None and asked != mode:
        variable = "WANDB_MODE" if MODES.get((named or "").lower()) == asked else "WANDB_DISABLED"
        yield f"wandb.mode={mode} is used, not {variable}={value(variable)}"
    if under_agent():
        if mode != "online":
            yield f"wandb.mode={mode}: the sweep agent does not learn what becomes of this job and may start it again"
        return
    if mode == "disabled":
        return
    for key in ("project", "entity"):
        variable = f"WANDB_{key.upper()}"
        if value(variable) not in (None, settings[key]):
            yield f"wandb.{key}={settings[key]} is used, not {variable}={value(variable)}"
    for variable in UNUSED:
        if value(variable):
            yield f"{variable}={value(variable)} is not used: a run's W&B id is its run id, and its record is whole"


@contextmanager
def decided() -> Iterator[None]:
    """Hide the variables in DECIDED from the client inside the block."""
    names = [name for name in DECIDED if not (under_agent() and name in OF_AN_AGENT)]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)

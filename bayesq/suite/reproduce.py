"""Run a recorded result again, in a temporary folder, and compare every number and every code with the record.

python -m bayesq.suite.reproduce results/<run_id>              with cached statistics
python -m bayesq.suite.reproduce results/<run_id> --fresh      computing all statistics, logits and fitted weights again
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from bayesq.suite import code_digest, provenance, results, runner, schema, workload
from bayesq.suite import config as settings
from bayesq.suite.arguments import exit_with, module_parser
from bayesq.suite.composition import Preflight
from bayesq.suite.errors import UserError
from bayesq.tensor_file import CorruptFile, read_tensors

# The run uses `config`; a difference in the other records is only a warning.
RECORDS = ("config", "versions", "host", "git", code_digest.KEY)
# Prefixes of result keys that depend on the machine, its packages and its load.
OF_THE_MACHINE = ("time/", "memory/", "fallback/oom_retries", "wandb/", "source.statistics")
# Subfolders of the cache that --fresh does not reuse; downloads are reused.
COMPUTED = ("full_precision", "models", "statistics")
# Keys without effect on the result that keep their recorded values.
NEEDED_HERE = ("device", "cache_dir")
# Keys that records of earlier versions lack, with the values that change nothing.
NEWER: dict[str, dict[str, Any]] = {
    "calibration": {"source": None},
    "evaluation": {"zeroshot": [], "zeroshot_root": None, "zeroshot_limit": None},
}
AXES = ("model", "dataset", "method", "posterior")

Difference = tuple[str, str, str]  # name, recorded value, value here


def differing(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Difference]:
    """Each key whose values differ, or that only one side has."""
    for key in dict.fromkeys([*recorded, *here]):
        one, other = recorded.get(key, "absent"), here.get(key, "absent")
        if one != other:
            yield key, str(one), str(other)


def numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a result, except those that depend on the machine."""
    flat = settings.flatten({key: value for key, value in result.items() if key not in RECORDS})
    return {key: value for key, value in flat.items() if not key.startswith(OF_THE_MACHINE)}


def compare_tables(recorded: Path, here: Path) -> list[Difference]:
    """Cells that differ between two CSV files, except those of `seconds` and of columns that older records lack."""
    first, second = (results.read_rows(path) for path in (recorded, here))
    if len(first) != len(second):
        return [(recorded.name, f"{len(first)} rows", f"{len(second)} rows")]
    differences = []
    for number, (row, other) in enumerate(zip(first, second, strict=True), start=1):
        known = {key: cell for key, cell in other.items() if key in row}
        cells = [cell for cell in differing(row, known) if cell[0] != "seconds"]
        differences += [(f"{recorded.name}, row {number}: {key}", then, now) for key, then, now in cells]
    return differences


def compare_codes(recorded: Path, here: Path) -> list[Difference]:
    """Header entries and tensors that differ between two files of packed codes."""
    if recorded.read_bytes() == here.read_bytes():
        return []
    try:
        first, header = read_tensors(recorded)
    except CorruptFile as error:
        return [(recorded.name, f"damaged ({settings.one_line(str(error))})", "whole")]
    second, other_header = read_tensors(here)
    known = {key: text for key, text in other_header.items() if key in header}  # older files have fewer keys
    differences = [(f"{recorded.name}, header: {key}", then, now) for key, then, now in differing(header, known)]
    for name in dict.fromkeys([*first, *second]):
        one, other = first.get(name), second.get(name)
        if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
            then, now = ("absent" if x is None else f"{x.dtype} {list(x.shape)}" for x in (one, other))
            differences.append((f"{recorded.name}: {name}", then, now))
        elif not torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)):
            unequal = int((one != other).sum())
            differences.append((f"{recorded.name}: {name}", f"{one.numel()} elements", f"{unequal} of them differ"))
    return differences or [(recorded.name, "other bytes", "the same tensors")]


COMPARED = {
    results.LAYERS_FILE: compare_tables,
    results.PREDICTIONS_FILE: compare_tables,
    results.QUANTIZED_FILE: compare_codes,
}


def compare_runs(recorded: Path, here: Path) -> list[Difference]:
    """Differences between the files of two finished runs."""
    first, second = (results.recorded_result(folder) for folder in (recorded, here))
    differences = list(differing(numbers(first), numbers(second)))
    for name, compare in COMPARED.items():
        if (recorded / name).is_file():
            differences += compare(recorded / name, here / name)
        else:
            differences.append((name, "no file", "written"))
    return differences


def warnings(result: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One line for each difference in code, packages and hardware; `here` has the records of this process."""
    lines = []
    for record in ("git", "versions", "host"):
        changed = [entry for entry in differing(result.get(record, {}), here[record]) if entry[0] != "directory"]
        lines += [f"{record}.{key}: recorded {then}, here {now}" for key, then, now in changed]
    if code_digest.has_changed(result):
        lines.append(f"{code_digest.KEY}: the sources that compute a result have changed since the record")
    states = {"the record was": result.get("git", {}), "this checkout is": here["git"]}
    dirty = [where for where, state in states.items() if state.get("dirty")]
    return [*lines, *(f"git.dirty: {where} of files that differ from their commit" for where in dirty)]


def recorded_config(result: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a result. Keys without effect get their defaults, except the device and the cache.

    Raises UserError if other keys determine a result in this version of the suite.
    """
    config: dict[str, Any] = {"codec": "fixed", **result["config"]}
    config |= {group: {**keys, **config.get(group, {})} for group, keys in NEWER.items()}
    reference = Preflight().reference({})
    reference["wandb"] = OmegaConf.to_container(OmegaConf.create(reference["wandb"]), resolve=True)
    elsewhere = (*AXES, *settings.WITHOUT_EFFECT)
    try:
        settings.check_keys(*({k: v for k, v in keys.items() if k not in elsewhere} for keys in (config, reference)))
    except UserError as error:
        version, commit = result.get("versions", {}).get("bayesq"), result.get("git", {}).get("commit")
        raise UserError(
            f"the record is of another version, bayesq {version} at commit {commit}, which has to be installed to "
            f"reproduce it ({error})"
        ) from error
    defaults = {key: reference[key] for key in settings.WITHOUT_EFFECT if key in reference and key not in NEEDED_HERE}
    return {**config, **defaults}


def fresh_cache(cache_dir: Path, folder: Path) -> Path:
    """Make a cache in `folder` with links to the downloads in `cache_dir` and without computed files."""
    folder.mkdir()
    for entry in cache_dir.iterdir() if cache_dir.is_dir() else ():
        if entry.name not in COMPUTED:
            (folder / entry.name).symlink_to(entry)
    return folder


def run_again(result: Mapping[str, Any], folder: Path, fresh: bool) -> Path:
    """Run the configuration of `result` below the temporary `folder` and return the folder of the new run.

    The process changes to the recorded working directory, because the config may have relative paths. It uses the
    recorded number of threads, because the order of summation depends on it. Raises UserError if the configuration
    cannot be run on this machine.
    """
    config = recorded_config(result)
    directory = Path(result["host"].get("directory", "."))
    if directory.is_dir():
        os.chdir(directory)
    else:
        print(f"warning: host.directory: there is no {directory}; relative paths begin here", file=sys.stderr)
    torch.set_num_threads(int(result["host"]["threads"]))
    cfg: DictConfig = OmegaConf.create(config)
    cache_dir = settings.resolve_cache_dir(cfg.cache_dir)
    cfg.cache_dir = str(fresh_cache(cache_dir, folder / "cache") if fresh else cache_dir)
    cfg.results_dir = str(folder / "results")
    cfg.wandb.mode = "disabled"
    schema.validate(cfg)
    settings.check_device(cfg)
    here = {
        "git": provenance.git_state(),
        "versions": provenance.versions(),
        "host": provenance.host(workload.select_device(cfg.device)),
    }
    for line in warnings(result, here):
        print(f"warning: {line}", file=sys.stderr, flush=True)
    runner.run(cfg)
    return settings.run_dir(cfg)


def reproduce(recorded: Path, fresh: bool) -> list[Difference]:
    """Run the result in the folder `recorded` again and return the differences.

    Raises UserError if there is no finished run, or if its configuration cannot be run on this machine.
    """
    recorded = recorded.absolute()
    result = results.recorded_result(recorded)
    with tempfile.TemporaryDirectory(prefix="bayesq-reproduce-") as temporary:
        return compare_runs(recorded, run_again(result, Path(temporary), fresh))


def show(differences: Sequence[Difference], limit: int = 40, length: int = 48) -> str:
    """Text table of the first `limit` differences with values up to `length` characters, and a count of the others."""

    def short(text: str) -> str:
        return text if len(text) <= length else f"{text[: length - 3]}..."

    rows = [[key, short(then), short(now)] for key, then, now in differences[:limit]]
    table = tabulate(rows, headers=["differs", "recorded", "here"], disable_numparse=True)
    more = len(differences) - limit
    return f"{table}\n... and {more} more" if more > 0 else table


def main() -> None:
    """Print the differences; the exit code is 0 if there are none."""
    parser = module_parser("reproduce", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run: results/<run_id>")
    parser.add_argument("--fresh", action="store_true", help="reuse no cached statistics, logits or fitted weights")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        differences = reproduce(arguments.run, arguments.fresh)
    except UserError as error:
        exit_with(error)
    if differences:
        print(show(differences))
        sys.exit(1)
    *tables, codes = COMPARED
    print(f"identical: every number of {results.RESULT_FILE}, {', '.join(tables)} and {codes}")


if __name__ == "__main__":
    main()

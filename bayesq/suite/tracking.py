"""Weights & Biases beside the result files: one W&B run per run, which may fail without costing a result."""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from omegaconf import DictConfig

from bayesq.suite import wandb_environment as environment
from bayesq.suite.config import check_wandb_login, flatten, one_line, resolved
from bayesq.suite.errors import UserError
from bayesq.suite.labels import model_label
from bayesq.suite.plots import CHARTS
from bayesq.suite.results import PREDICTIONS_FILE, plain, write_csv
from bayesq.suite.wandb_names import label, project_label, tag_list

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

# Seconds until wandb.mode=online stops trying to reach the server. With the client's default of 90 at the start a
# wrong address looks like a hang. At the end the client would retry an upload without limit and block the sweep.
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 60.0
# Key of the table of layers.
LAYERS_KEY = "layers"
# Folder in the client's folder with the data that offline runs upload later, by run id.
DATA_FOLDER = "data"
# The client's background process writes less than this after it has said that a run is finished.
SPARE_BYTES = 256 * 2**10
# The client refuses an artifact with more metadata keys.
ARTIFACT_KEYS = 100
# Key of result.json: null once W&B has the result, else the reason why it does not.
ERROR_KEY = "wandb/error"
# Value of ERROR_KEY until W&B has the result: a killed process cannot write a reason.
UNFINISHED = "the process ended before W&B had the result"


class Tracker:
    """Where a run reports to: `with track(...) as tracker: ...; tracker.log_result(result, layers, predictions)`.

    `error` is one line about why W&B does not have the result, and None once it has it or where tracking is disabled.
    Leaving the block by an exception marks the W&B run as failed.

    Attributes:
        started: whether there is a W&B run.
    """

    def __init__(self, run: "wandb.Run | None", log_artifact: bool = False, error: str | None = None) -> None:
        self._run, self._log_artifact = run, log_artifact
        self._failed = False
        self.started = run is not None
        self.error = error if run is None else UNFINISHED

    def log_result(
        self,
        result: Mapping[str, Any],
        layers: Sequence[Mapping[str, Any]],
        predictions: Sequence[Mapping[str, Any]] = (),
        checkpoint: Path | None = None,
    ) -> None:
        """Log the flat result under its own keys as the run's summary, one table row per layer, plots and predictions.

        Predictions are a file of the run, as W&B tables end after 10,000 rows.

        Call it after result.json is written: a failure here becomes a warning and `error`, never an exception.

        Args:
            result: the flat result.
            layers: rows of layers.csv.
            predictions: rows of predictions.csv.
            checkpoint: the packed file, logged as an artifact where wandb.log_artifact=true.
        """
        if self._run is None:
            return
        import wandb

        try:
            self._run.summary.update(plain({key: value for key, value in result.items() if key != ERROR_KEY}))
            logged: dict[str, Any] = {}
            if layers:
                rows = [[row.get(column) for column in layers[0]] for row in layers]
                logged[LAYERS_KEY] = _table([*layers[0]], rows)
            for chart in CHARTS:
                if rows := chart.rows(layers, predictions):
                    table = _table([*chart.columns], rows)
                    logged[chart.key] = wandb.plot_table(chart.preset, table, dict(chart.fields), chart.texts)
            with _data_dir(Path(self._run.settings.wandb_dir) / DATA_FOLDER / self._run.id):
                if logged:
                    self._run.log(logged)
                if predictions:  # a copy for `wandb sync` lies in the client's folder
                    folder = Path(self._run.settings.files_dir)
                    write_csv(folder / PREDICTIONS_FILE, predictions)
                    self._run.save(folder / PREDICTIONS_FILE, base_path=folder, policy="now")
                if self._log_artifact and checkpoint is not None:
                    self._run.log_artifact(_artifact(self._run.id, result, checkpoint))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception, remedy: str = "") -> None:
        self._failed = True
        self.error = reason(error) + remedy
        log.warning("W&B could not log this run (which does not touch its files): %s", self.error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the W&B run, as failed when the block raised or W&B lost something."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=0 if error is None and not self._failed else 1)
            if self._run.offline and not self._failed:
                _check_disk(Path(self._run.settings.sync_dir))
        except Exception as failure:
            complete = error is None and not self._failed and not self._run.offline
            folder = Path(self._run.settings.sync_dir)
            remedy = f"; to upload it: wandb sync --include-online {folder.parent.name}/{folder.name}"
            self._fail(failure, remedy if complete else "")
        if not self._failed and error is None:
            self.error = None


def _check_disk(folder: Path) -> None:
    """Check that the disk is not full: the client's background process drops data silently when it is.

    Raises:
        OSError: the disk or the quota is full.
    """
    if shutil.disk_usage(folder).free < SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(SPARE_BYTES))


def _table(columns: list[str | int], rows: Sequence[Sequence[Any]]) -> "wandb.Table":
    """A W&B table of `rows`, whose columns may mix types."""
    import wandb

    return wandb.Table(columns=columns, data=[[_cell(x) for x in row] for row in rows], allow_mixed_types=True)


@contextmanager
def _data_dir(folder: Path) -> Iterator[None]:
    """Keep what offline runs upload later beside them, unless WANDB_DATA_DIR says where.

    The client would put tables into the home folder, where they pile up, and `wandb sync` would find none of them on
    another machine that shares the results.
    """
    name = "WANDB_DATA_DIR"
    chosen = os.environ.setdefault(name, str(folder))
    try:
        yield
    finally:
        if chosen == str(folder):
            del os.environ[name]


def _artifact(run_id: str, result: Mapping[str, Any], checkpoint: Path) -> "wandb.Artifact":
    """The packed file as an artifact of its own, described by the scalars of the result."""
    import wandb

    scalars = [(key, value) for key, value in plain(result).items() if not isinstance(value, dict | list)]
    metadata = dict(scalars[:ARTIFACT_KEYS])
    artifact = wandb.Artifact(f"quantized-{run_id}", type="quantized-model", metadata=metadata)
    # "immutable" makes no copy: copies of offline runs that are never synced would fill the home folder.
    artifact.add_file(str(checkpoint), policy="immutable")
    return artifact


def _cell(value: Any) -> Any:
    """`value` as a table shows it: shapes and the like as text."""
    value = plain(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def reason(error: Exception) -> str:
    """What W&B raised, as one line; of values that its settings refuse, which one and why."""
    if isinstance(error, UserError):
        return one_line(str(error))
    if not (callable(listed := getattr(error, "errors", None)) and isinstance(error, ValueError)):
        return one_line(f"{type(error).__name__}: {error}").rstrip(".")
    refused = (f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in listed())
    return one_line("; ".join(refused)).rstrip(".")


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of `wandb.init` that make runs of a project groupable by method and budget without any clicks.

    The config is flat: each axis is its chosen name (`method: gptq`), everything else is joined by slashes like the
    keys of a result (`calibration/examples`), and nothing in it is shortened. Labels are shortened to W&B's limits;
    WANDB_RUN_GROUP, WANDB_JOB_TYPE and WANDB_NAME come before the suite's own.
    """
    config = resolved(cfg)
    dataset, method = (config[axis]["name"] for axis in ("dataset", "method"))
    model = model_label(config)
    flat = flatten(config, separator="/")
    for key in [key for key in flat if key.endswith("/name") and key.count("/") == 1]:
        flat[key.removesuffix("/name")] = flat.pop(key)
    changed = model.removeprefix(str(config["model"]["name"]))  # of the network, if anything was
    named = f"{method}-{config['bits']:g}-s{config['seed']}{changed}"
    defaults = {"group": f"{model}-{dataset}", "job_type": method, "name": named}
    variables = {"group": "WANDB_RUN_GROUP", "job_type": "WANDB_JOB_TYPE", "name": "WANDB_NAME"}
    added = (environment.value("WANDB_TAGS") or "").split(",")
    return {
        "project": project_label(config["wandb"]["project"]),
        "entity": config["wandb"]["entity"],
        **{key: label(environment.value(variables[key]) or text) for key, text in defaults.items()},
        "tags": tag_list([*map(str, (model, dataset, method)), f"{config['bits']:g}-bit", *map(str.strip, added)]),
        "config": flat,
    }


@contextmanager
def track(cfg: DictConfig, run_id: str, run_dir: Path) -> Iterator[Tracker]:
    """One W&B run around one run of the suite, as wandb.mode says; `disabled` does not even import wandb.

    All offline runs of a results folder share its wandb/ folder (or the one below WANDB_DIR), where `wandb leet` and
    `wandb sync` find them. The W&B id is the run id, or under a sweep agent the one that the agent has chosen: whatever
    was synced of an attempt that was killed is replaced, never duplicated, and its local record is removed, because
    `wandb sync` uploads nothing at all when one record is cut short.

    Where W&B does not start, for whatever reason, the tracker's `error` says why, and the block runs without it.

    Args:
        cfg: the composed configuration.
        run_id: `bayesq.suite.config.run_id(cfg)`.
        run_dir: the run's folder; its parent gets the wandb/ folder.
    """
    run, error = None, None
    if cfg.wandb.mode != "disabled":
        try:
            run = _start(cfg, run_id, client_folder(run_dir.parent))
        except Exception as failure:
            error = f"W&B did not start ({reason(failure)})"
            log.warning("wandb.mode=%s: %s; the run goes on without it", cfg.wandb.mode, error)
    with Tracker(run, bool(cfg.wandb.log_artifact), error) as tracker:
        yield tracker


def client_folder(results_dir: Path) -> Path:
    """The folder that gets the client's wandb/ folder: the one of WANDB_DIR, else the results folder.

    Raises:
        OSError: it cannot be made or written; the client would silently take the system's temporary one.
    """
    folder = Path(environment.value("WANDB_DIR") or results_dir).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def _settings() -> "wandb.Settings":
    """Settings of every W&B run."""
    import wandb

    # every result records commit and versions; the console belongs to the results, not to the client
    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        # a run that could not be finished must not receive what the next one logs
        reinit="create_new",
    )


def _start(cfg: DictConfig, run_id: str, folder: Path) -> "wandb.Run":
    """The W&B run, whose files lie in `folder`/wandb."""
    import wandb

    mode = cfg.wandb.mode
    check_wandb_login(cfg)  # on a terminal the client would ask for a key and wait
    arguments = identity(cfg)
    project, taken = cfg.wandb.project, arguments["project"]
    if taken != project:
        log.info("wandb.project=%s: W&B takes no such name, the run is in %s", project, taken)
    _remove_attempts(folder / "wandb", run_id)
    start = partial(wandb.init, **arguments, id=run_id, mode=mode, dir=folder, settings=_settings())
    with environment.decided():
        try:
            return start()
        except wandb.Error:
            raise
        except Exception:
            # the client's background process has died, as in an earlier run of this sweep; the next gets another
            with suppress(Exception):
                wandb.teardown()
            return start()


def report_refusal(error: str) -> None:
    """Under a sweep agent, log a failed run for a command that was refused before it could log one.

    The agent restarts a job that began no W&B run.
    """
    if not environment.under_agent() or environment.default("mode", None) != "online":
        return
    try:
        import wandb

        folder = client_folder(Path("results"))
        with environment.decided():
            run = wandb.init(dir=folder, mode="online", settings=_settings(), job_type="refused", notes=error)
        run.finish(exit_code=1)
    except Exception as failure:
        log.warning("the sweep agent could not be told: %s", reason(failure))


def _remove_attempts(folder: Path, run_id: str) -> None:
    """Remove what earlier attempts at a run, offline or online, left in the client's folder."""
    for attempt in (*folder.glob(f"*run-*-{run_id}"), folder / DATA_FOLDER / run_id):
        shutil.rmtree(attempt, ignore_errors=True)

"""Weights & Biases tracking: each run of the suite is one W&B run. A failure of W&B never loses the run's result."""

import atexit
import errno
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig

from bayesq.suite import results
from bayesq.suite import wandb_environment as environment
from bayesq.suite.config import check_wandb_login, flatten, one_line, resolved
from bayesq.suite.errors import UserError
from bayesq.suite.labels import model_label
from bayesq.suite.plots import CHARTS
from bayesq.suite.wandb_artifacts import log_artifacts
from bayesq.suite.wandb_history import LIVE, History, define_metrics, is_number, layer_record
from bayesq.suite.wandb_names import ablation_of, label, project_label, switches, tag_list

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

# Seconds until wandb.mode=online gives up. The client's default at the start, 90, makes a wrong address look like a
# hang. At the end the client would repeat a failed upload forever and block the sweep.
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 60.0
# Seconds that the client has when the program ends. It waits without limit for its background process, which finishes
# runs that it could not start within FINISH_TIMEOUT_S.
EXIT_TIMEOUT_S = 90.0
# Key of the table of layers.
LAYERS_KEY = "layers"
# Parts of a result's provenance that W&B's config has too; the settings are there from the start.
MACHINE = ("versions", "host", "git")
# Subfolder of the client's wandb/ folder: files that `wandb sync` uploads later, by run id.
DATA_FOLDER = "data"
# After the client reports a run as finished, its background process still writes less than this.
SPARE_BYTES = 256 * 2**10
# Key of result.json: null if W&B has the result, else the reason why not.
ERROR_KEY = "wandb/error"
# Value of ERROR_KEY until W&B has the result, because a killed process cannot write a reason.
UNFINISHED = "the process ended before W&B had the result"


class Tracker:
    """The W&B run of a run: `with track(...) as tracker: ...; tracker.log_result(result, layers, predictions)`.

    Attributes:
        history: logs the steps of the run as soon as they are done.
        error: why W&B does not have the result, in one line; None once it has it, or if tracking is disabled.
    """

    def __init__(
        self, run: "wandb.Run | None", settings: Mapping[str, Any], run_dir: Path, error: str | None = None
    ) -> None:
        """`settings` is the group wandb of the configuration, `run_dir` the run's folder, which has its log."""
        self._run, self._run_dir = run, run_dir
        self._log_artifact, self._registry = settings.get("log_artifact"), settings.get("registry")
        self.started = run is not None
        self.error = error if run is None else UNFINISHED
        self.history = History(self._record)

    def _record(self, record: dict[str, Any]) -> None:
        """Log a record of the history; a failure becomes a warning and `error`."""
        if self._run is None or self.error != UNFINISHED:
            return
        try:
            self._run.log(record)
        except Exception as error:
            self._fail(error)

    def log_result(
        self,
        result: Mapping[str, Any],
        layers: Sequence[Mapping[str, Any]],
        predictions: Sequence[Mapping[str, Any]] = (),
        checkpoint: Path | None = None,
    ) -> None:
        """Log the result, the layers, the charts, and the predictions, the log and the code's diff as files.

        Numbers of the result and of each layer are history; the summary has the result without its provenance; the
        layers are also a table. Predictions are a file, because a W&B table has at most 10,000 rows. Call it after
        result.json is written. A failure becomes a warning and `error`, never an exception.

        `layers` and `predictions` are rows of layers.csv and predictions.csv. The packed file `checkpoint` becomes an
        artifact if wandb.log_artifact=true, beside the inputs' checksums.
        """
        if self._run is None:
            return
        import wandb

        try:
            content = results.plain({key: value for key, value in result.items() if key != ERROR_KEY})
            for index, row in enumerate(layers):
                known = LIVE if index < self.history.layers else ()
                if len(record := layer_record(index, {key: row[key] for key in row if key not in known})) > 1:
                    self._run.log(record)
            self._run.summary.update({key: value for key, value in content.items() if key not in results.PROVENANCE})
            made = {key: content[key] for key in MACHINE if content.get(key)}
            self._run.config.update(flatten(made, "/"), allow_val_change=True)
            logged = {key: value for key, value in content.items() if is_number(value)}
            if layers:
                logged[LAYERS_KEY] = _table([*layers[0]], [[row.get(key) for key in layers[0]] for row in layers])
            for chart in CHARTS:
                if rows := chart.rows(layers, predictions):
                    table = _table([*chart.columns], rows)
                    logged[chart.key] = wandb.plot_table(chart.preset, table, dict(chart.fields), dict(chart.texts))
            with _data_dir(Path(self._run.settings.wandb_dir) / DATA_FOLDER / self._run.id):
                if logged:
                    self._run.log(logged)
                folder = Path(self._run.settings.files_dir)  # where `wandb sync` looks for files
                results.write_json(folder / results.RESULT_FILE, content)
                if predictions:
                    results.write_csv(folder / results.PREDICTIONS_FILE, predictions)
                for name in (results.LOG_FILE, results.DIFF_FILE):
                    if (self._run_dir / name).exists():
                        shutil.copyfile(self._run_dir / name, folder / name)
                for name in (results.RESULT_FILE, results.PREDICTIONS_FILE, results.LOG_FILE, results.DIFF_FILE):
                    if (folder / name).exists():
                        self._run.save(folder / name, base_path=folder, policy="now")
                if self._log_artifact:
                    log_artifacts(self._run, result, checkpoint, self._registry, FINISH_TIMEOUT_S)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception, remedy: str = "") -> None:
        self.error = reason(error) + remedy
        log.warning("W&B could not log this run; its result files are complete: %s", self.error)

    def finish(self, raised: bool) -> None:
        """Finish the W&B run; it counts as failed if the run has `raised` an error or `log_result` failed."""
        if self._run is None:
            return
        logged = self.error == UNFINISHED  # `log_result` did not fail
        complete = logged and not raised
        try:
            self._run.finish(exit_code=0 if complete else 1)
            if self._run.offline and logged:
                _check_disk(Path(self._run.settings.sync_dir))
        except Exception as failure:
            folder = Path(self._run.settings.sync_dir)
            remedy = f"; to upload it: wandb sync --include-online {folder.parent.name}/{folder.name}"
            self._fail(failure, remedy if complete and not self._run.offline else "")
        else:
            self.error = None if complete else self.error


def _check_disk(folder: Path) -> None:
    """Raise OSError if the disk or the quota is full: the client's background process then drops data silently."""
    if shutil.disk_usage(folder).free < SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(SPARE_BYTES))


def _table(columns: list[str | int], rows: Sequence[Sequence[Any]]) -> "wandb.Table":
    """A W&B table; lists such as shapes become text."""
    import wandb

    def cell(value: Any) -> Any:
        return str(value) if isinstance(value, dict | list) else value

    cells = ([cell(results.plain(x)) for x in row] for row in rows)
    return wandb.Table(columns=columns, data=[*cells], allow_mixed_types=True)


@contextmanager
def _data_dir(folder: Path) -> Iterator[None]:
    """Let the client store tables in `folder` until they are uploaded, unless WANDB_DATA_DIR is set.

    By default the client stores them in the home folder. They would fill it up, and `wandb sync` on another machine
    would not find them.
    """
    chosen = os.environ.setdefault("WANDB_DATA_DIR", str(folder))
    try:
        yield
    finally:
        if chosen == str(folder):
            del os.environ["WANDB_DATA_DIR"]


def reason(error: Exception) -> str:
    """An error of W&B in one line. A settings error names each refused setting."""
    if isinstance(error, UserError):
        return one_line(str(error))
    if callable(listed := getattr(error, "errors", None)) and isinstance(error, ValueError):  # of pydantic
        text = "; ".join(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in listed())
    else:
        text = f"{type(error).__name__}: {error}"
    return one_line(text).rstrip(".")


def identity(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments of `wandb.init` that name the run: project, entity, group, job type, name, tags, notes and config.

    The config is flat. A group of the config is its name (`method: gptq`); other keys are joined by slashes, as in a
    result (`calibration/examples`). `ablation` is the preset among the `overrides` of the command, all of which are in
    the name and the tags. Labels are shortened to W&B's limits, the config is not. The keys of wandb replace the
    suite's labels, and so do WANDB_RUN_GROUP, WANDB_JOB_TYPE and WANDB_NAME.
    """
    config = resolved(cfg)
    dataset, method, bits = config["dataset"]["name"], config["method"]["name"], f"{config['bits']:g}"
    model = model_label(config)
    changed = model.removeprefix(str(config["model"]["name"]))  # what the label adds to the model's name
    marks = [mark for mark in switches(overrides) if mark.removeprefix("model.") not in changed]
    labels = {
        "group": ("WANDB_RUN_GROUP", f"{model}-{dataset}"),
        "job_type": ("WANDB_JOB_TYPE", method),
        "name": ("WANDB_NAME", " ".join([f"{method}-{bits}-s{config['seed']}{changed}", *marks])),
    }
    added = [*(config["wandb"].get("tags") or []), *(environment.value("WANDB_TAGS") or "").split(",")]
    flat = {re.sub(r"^([^/]+)/name$", r"\1", key): value for key, value in flatten(config, "/").items()}
    return {
        "project": project_label(config["wandb"]["project"]),
        "entity": config["wandb"]["entity"],
        **{
            key: label(config["wandb"].get(key) or environment.value(variable) or text)
            for key, (variable, text) in labels.items()
        },
        "tags": tag_list([*map(str, (model, dataset, method)), f"{bits}-bit", *marks, *map(str.strip, added)]),
        "notes": config["wandb"].get("notes"),
        "config": {**flat, "ablation": ablation_of(overrides)},
    }


@contextmanager
def track(cfg: DictConfig, run_id: str, run_dir: Path) -> Iterator[Tracker]:
    """Track one run of the suite as one W&B run, as wandb.mode says; `disabled` does not even import wandb.

    The W&B id is the run id, or the id that a sweep agent chose. A repeated run replaces what a killed attempt has
    uploaded. The local record of that attempt is removed, because one incomplete record makes `wandb sync` upload
    nothing. All runs of a results folder share its wandb/ folder, or the one below WANDB_DIR, for `wandb leet` and
    `wandb sync`. If W&B does not start, the run continues without it and the tracker's `error` says why.
    """
    run, error = None, None
    if cfg.wandb.mode != "disabled":
        try:
            arguments = identity(cfg, results.recorded_overrides(run_dir)) | {"id": run_id, "mode": cfg.wandb.mode}
            run = _start(cfg, arguments, client_folder(run_dir.parent))
        except Exception as failure:
            error = f"W&B did not start ({reason(failure)})"
            log.warning("wandb.mode=%s: %s; the run goes on without it", cfg.wandb.mode, error)
    tracker = Tracker(run, cfg.wandb, run_dir, error)
    raised = True
    try:
        yield tracker
        raised = False
    finally:
        tracker.finish(raised)


def client_folder(results_dir: Path) -> Path:
    """The folder in which the client creates its wandb/ folder: WANDB_DIR, or the results folder.

    Raises OSError if it cannot be written. The client itself would silently use the system's temporary folder.
    """
    folder = Path(environment.value("WANDB_DIR") or results_dir).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def _init(**arguments: Any) -> "wandb.Run":
    """`wandb.init` with the settings of every W&B run."""
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,  # the result records the commit
        x_save_requirements=False,  # and versions; listing every installed package takes longer than a small run
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        reinit="create_new",  # a W&B run that could not be finished must not receive the next run's result
    )
    with environment.decided():
        return wandb.init(settings=settings, **arguments)


def _start(cfg: DictConfig, arguments: dict[str, Any], folder: Path) -> "wandb.Run":
    """Start the W&B run with its files in `folder`/wandb, and remove the files of earlier attempts at the run."""
    import wandb

    check_wandb_login(cfg)  # without a key the client would ask for one on a terminal, and wait
    run_id = arguments["id"]
    if arguments["project"] != cfg.wandb.project:
        project = arguments["project"]
        log.info("wandb.project=%s: W&B does not accept this name; the project is %s", cfg.wandb.project, project)
    client = folder / "wandb"
    for attempt in (*client.glob(f"*run-*-{run_id}"), client / DATA_FOLDER / run_id):
        shutil.rmtree(attempt, ignore_errors=True)
    try:
        run = _init(**arguments, dir=folder)
    except wandb.Error:
        raise
    except Exception:
        # The client's background process died, for example in an earlier run of this sweep. Start another one.
        with suppress(Exception):
            wandb.teardown()
        run = _init(**arguments, dir=folder)
    define_metrics(run)
    return run


def report_refusal(error: str) -> None:
    """Under a sweep agent, log a failed W&B run for a command that was refused before it started one.

    Without a W&B run the agent would start the job again.
    """
    if not environment.under_agent() or environment.default("mode", None) != "online":
        return
    try:
        _init(dir=client_folder(Path("results")), mode="online", job_type="refused", notes=error).finish(exit_code=1)
    except Exception as failure:
        log.warning("the sweep agent could not be told: %s", reason(failure))


def leave(code: int | str | None) -> NoReturn:
    """`sys.exit(code)` for programs that track runs: the client can delay the exit by at most EXIT_TIMEOUT_S.

    Every run is finished before, so nothing is lost. The client's background process ends after this process.
    """
    if "wandb" in sys.modules:
        ending = threading.Event()
        threading.Thread(target=_end_after, args=(ending, code), daemon=True).start()
        atexit.register(ending.set)  # called before the client's own function, which is registered earlier
    sys.exit(code)


def _end_after(ending: threading.Event, code: int | str | None) -> None:
    """End the process with the status of `code` EXIT_TIMEOUT_S after `ending` is set."""
    ending.wait()
    time.sleep(EXIT_TIMEOUT_S)
    print(f"W&B's client did not end within {EXIT_TIMEOUT_S:g} s: the program ends without it", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))

"""What a W&B run has read and made, as artifacts, so that W&B shows its lineage.

Weights, examples and statistics are inputs: an artifact holds their checksum, not the data, so runs with equal inputs
share a version. The packed file is the output; it can be linked to a registry.
"""

import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from bayesq.suite.results import plain
from bayesq.suite.wandb_names import label

if TYPE_CHECKING:
    import wandb

CHECKSUM_FILE = "checksum.json"
PACKED_TYPE = "quantized-model"
REGISTRY = "wandb-registry-"
# Characters that names of artifacts and of collections in a registry may have on every server.
NAME_CHARACTERS = {*string.ascii_letters, *string.digits, *"-_."}
# The client refuses an artifact with more metadata keys.
ARTIFACT_KEYS = 100


def log_artifacts(
    run: "wandb.Run", result: Mapping[str, Any], checkpoint: Path | None, registry: str | None, seconds: float
) -> None:
    """Log the packed file and, if the run is online, its inputs, and link the file to a registry.

    The client can record inputs and links only online; it then waits for the server.

    Args:
        checkpoint: the packed file; None = it was deleted.
        registry: its name; None = no link.

    Raises:
        TimeoutError: the server does not answer in `seconds`; or another error of the client.
    """
    packed = run.log_artifact(_packed(run.id, result, checkpoint)) if checkpoint is not None else None
    if run.offline:
        return

    def record() -> None:
        for artifact in inputs(result):
            run.use_artifact(artifact)
        if registry and packed is not None:
            target = f"{REGISTRY}{registry.removeprefix(REGISTRY)}/{_name(result['model'], result['dataset'])}"
            run.link_artifact(packed, target, aliases=[run.id])

    _within(seconds, record)


def inputs(result: Mapping[str, Any]) -> Iterator["wandb.Artifact"]:
    """Artifacts of what a run has read; results of earlier versions name no statistics."""
    source, model, dataset = result.get("source") or {}, result.get("model"), result.get("dataset")
    for kind, type_name, of, checksum, said in (
        ("weights", "weights", [model], source.get("weights"), source.get("model")),
        ("calibration", "dataset", [dataset], source.get("calibration"), source.get("dataset")),
        ("evaluation", "dataset", [dataset], source.get("evaluation"), source.get("dataset")),
        ("statistics", "statistics", [model, dataset], source.get("statistics"), {}),
    ):
        if checksum:
            yield _checksum(_name(kind, *of), type_name, checksum, said or {})


def _checksum(name: str, type_name: str, checksum: Any, said: Mapping[str, Any]) -> "wandb.Artifact":
    """An artifact whose one file is the checksum, so its version depends on nothing else; `said` is metadata."""
    import wandb

    artifact = wandb.Artifact(name, type_name, metadata=_metadata(said.items()))
    with artifact.new_file(CHECKSUM_FILE) as file:
        json.dump({"sha256": checksum}, file, indent=2, sort_keys=True)
    return artifact


def _packed(run_id: str, result: Mapping[str, Any], checkpoint: Path) -> "wandb.Artifact":
    """The packed file as an artifact, with scalars of the result as metadata."""
    import wandb

    scalars = ((key, value) for key, value in result.items() if not isinstance(value, dict | list))
    artifact = wandb.Artifact(f"quantized-{run_id}", PACKED_TYPE, metadata=_metadata(scalars))
    # With "immutable" the client makes no copy; copies of offline runs would fill the home folder.
    artifact.add_file(str(checkpoint), policy="immutable")
    return artifact


def _metadata(entries: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return dict(islice(plain(dict(entries)).items(), ARTIFACT_KEYS))


def _name(*parts: Any) -> str:
    text = "-".join(map(str, parts))
    return label(text, forbidden="".join({*text} - NAME_CHARACTERS))


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Run an action that may wait for a server forever; TimeoutError if it takes longer than `seconds`."""
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            action()
        except Exception as error:
            failures.append(error)

    thread = Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"W&B has not taken the artifacts within {seconds:g} s")
    for failure in failures:
        raise failure

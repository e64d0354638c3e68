"""Labels of W&B runs, shortened to the limits of W&B's client and server."""

import hashlib
from collections.abc import Iterable

from bayesq.suite.config import WITHOUT_EFFECT

# Limits in characters: of tags and projects by the client, of other labels by the server's database.
TAG_CHARACTERS, PROJECT_CHARACTERS, LABEL_CHARACTERS = 64, 128, 128
NOT_IN_PROJECTS = "/\\#?%:"
GAP = ".."
# Overrides that a label does not repeat: it has the axes, and places of files change nothing.
AXES = ("model", "dataset", "method", "bits", "seed", "experiment")
PLACES = ("model.name", "model.checkpoint", "dataset.name", "dataset.root", "dataset.hub", "dataset.folder")


def label(text: str, characters: int = LABEL_CHARACTERS, forbidden: str = "") -> str:
    """`text` if W&B accepts it, else its beginning and end with a digest, so that different texts stay different.

    The text may be a path that is not valid UTF-8. Forbidden characters become "-".
    """
    clean = text.encode("utf-8", "backslashreplace").decode().translate(dict.fromkeys(map(ord, forbidden), "-"))
    if clean == text and len(text) <= characters:
        return text
    digest = "-" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    room = characters - len(digest)
    if len(clean) > room:
        length = room - len(GAP)
        clean = clean[: length // 2] + GAP + clean[-(length - length // 2) :]
    return clean + digest


def ablation_of(overrides: Iterable[str]) -> str:
    """The ablation that a command chose; "full" without one."""
    chosen = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    return chosen.get("ablation", "full")


def switches(overrides: Iterable[str]) -> list[str]:
    """What a command changed, without axes and keys that change no number: an ablation's name, or key=value."""
    shown: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in (*AXES, *PLACES) or key.partition(".")[0] in WITHOUT_EFFECT or (key, value) == ("ablation", "full"):
            continue
        shown[key] = value if key == "ablation" else f"{key.removeprefix('method.')}={value}"
    return list(shown.values())


def tag_list(texts: list[str]) -> list[str]:
    """Labels of the texts, without blank texts and duplicates."""
    return list(dict.fromkeys(label(text, TAG_CHARACTERS) for text in texts if text.strip()))


def project_label(name: str) -> str:
    """The name of a W&B project."""
    return label(name, PROJECT_CHARACTERS, NOT_IN_PROJECTS)

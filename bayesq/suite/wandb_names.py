"""Labels of W&B runs, shortened to the limits of W&B's client and server."""

import hashlib

# Limits in characters: of tags and projects by the client, of other labels by the server's database.
TAG_CHARACTERS, PROJECT_CHARACTERS, LABEL_CHARACTERS = 64, 128, 128
NOT_IN_PROJECTS = "/\\#?%:"
GAP = ".."


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


def tag_list(texts: list[str]) -> list[str]:
    """Labels of the texts, without blank texts and duplicates."""
    return list(dict.fromkeys(label(text, TAG_CHARACTERS) for text in texts if text.strip()))


def project_label(name: str) -> str:
    """The name of a W&B project."""
    return label(name, PROJECT_CHARACTERS, NOT_IN_PROJECTS)

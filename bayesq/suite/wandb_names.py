"""Labels of W&B runs, shortened to the limits of W&B's client and server."""

import hashlib

# characters; the client checks those of tags and projects, the server's columns end at those of the other labels
TAG_CHARACTERS, PROJECT_CHARACTERS, LABEL_CHARACTERS = 64, 128, 128
NOT_IN_PROJECTS = "/\\#?%:"
GAP = ".."


def label(text: str, characters: int = LABEL_CHARACTERS, forbidden: str = "") -> str:
    """`text` if W&B accepts it, else its beginning, its end and a digest of it.

    The digest keeps the labels of different texts different. The middle of a path says the least, so it is cut.

    Args:
        text: any text, paths that are no UTF-8 included.
        characters: the most that the label may have.
        forbidden: characters that it must not have.
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
    """Tags in their order, each once, without blank ones."""
    return list(dict.fromkeys(label(text, TAG_CHARACTERS) for text in texts if text.strip()))


def project_label(name: str) -> str:
    """The name of a W&B project."""
    return label(name, PROJECT_CHARACTERS, NOT_IN_PROJECTS)

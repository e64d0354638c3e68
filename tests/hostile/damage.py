"""Damage as disks, networks and hands do it, drawn from a seed."""

import random
from collections import Counter

KINDS = ("flip", "header", "truncate", "bytes", "zeros", "insert", "nul", "append", "swap")


def damaged(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A kind of damage and what it makes of a file's bytes; never the very same bytes."""
    while True:
        kind = draw.choice(KINDS)
        content = bytearray(whole)
        place = draw.randrange(len(content))
        if kind == "flip":
            content[place] ^= 1 << draw.randrange(8)
        elif kind == "header":
            content[draw.randrange(min(len(content), 300))] ^= 1 << draw.randrange(8)
        elif kind == "truncate":
            del content[place:]
        elif kind == "bytes":
            for _ in range(draw.randint(1, 8)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        elif kind == "zeros":  # a page that never reached the disk
            content[place : place + 64] = bytes(len(content[place : place + 64]))
        elif kind == "insert":
            content[place:place] = draw.randbytes(5)
        elif kind == "nul":
            content[place:place] = b"\0"
        elif kind == "append":
            content += draw.randbytes(9)
        else:  # two blocks in each other's place
            half = len(content) // 2
            content = content[half:] + content[:half]
        if bytes(content) != whole:
            return kind, bytes(content)


def report(what: str, outcomes: Counter[str], least: int) -> None:
    """Print how many inputs were tried, and make sure that none is missing."""
    print(f"{what}: {outcomes.total()} inputs tried: {dict(sorted(outcomes.items()))}")
    assert outcomes.total() >= least

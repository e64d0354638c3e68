"""stories260K: weights, tokenizer and logits against a naive reading of llama2.c's files in float64."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lm import prose

from bayesq.suite.datasets.text import TextFile
from bayesq.suite.errors import UserError
from bayesq.suite.models.tiny_stories import TOKENS, WEIGHTS, TinyStories

FOLDER = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.\nÉmile said: “No!”"
)

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is not there")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose(400), encoding="utf-8")
    return TinyStories(str(FOLDER)).build(TextFile(path=str(path), window=8).load(path.parent), path.parent)


def naive_tokens(text: str) -> list[int]:
    """The encoder of llama2.c: characters, or bytes; then the pair that makes the token of the highest score merges."""
    content, place, vocabulary, scores = (FOLDER / TOKENS).read_bytes(), 4, [], []
    while place < len(content):
        score, length = struct.unpack("<fi", content[place : place + 8])
        vocabulary.append(content[place + 8 : place + 8 + length])
        scores.append(score)
        place += 8 + length
    numbers = []
    for letter in " " + text:
        piece = letter.encode()
        numbers += [vocabulary.index(piece)] if piece in vocabulary else [byte + 3 for byte in piece]
    while True:
        best, at = -math.inf, None
        for k in range(len(numbers) - 1):
            pair = vocabulary[numbers[k]] + vocabulary[numbers[k + 1]]
            if pair in vocabulary and scores[vocabulary.index(pair)] > best:
                best, at = scores[vocabulary.index(pair)], k
        if at is None:
            return numbers
        numbers[at : at + 2] = [vocabulary.index(vocabulary[numbers[at]] + vocabulary[numbers[at + 1]])]


def naive_logits(tokens: list[int]) -> np.ndarray:
    """The forward pass of llama2.c: neighbours rotate together, heads one by one, [t, V] float64."""
    content = (FOLDER / WEIGHTS).read_bytes()
    dim, hidden, blocks, heads, kv_heads, vocabulary, _ = struct.unpack("<7i", content[:28])
    numbers, size = np.frombuffer(content, "<f4", offset=28).astype(np.float64), dim // heads

    def take(*shape: int) -> np.ndarray:
        nonlocal numbers
        taken, numbers = numbers[: math.prod(shape)].reshape(shape), numbers[math.prod(shape) :]
        return taken

    table, before = take(vocabulary, dim), take(blocks, dim)
    query, key, value = take(blocks, dim, dim), take(blocks, kv_heads * size, dim), take(blocks, kv_heads * size, dim)
    out, after = take(blocks, dim, dim), take(blocks, dim)
    gate, down, up, last = take(blocks, hidden, dim), take(blocks, dim, hidden), take(blocks, hidden, dim), take(dim)

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return scale * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def rotate(x: np.ndarray) -> np.ndarray:
        turned = x.copy()
        for t in range(len(x)):
            for k in range(0, x.shape[1], 2):
                angle = t / 10000 ** ((k % size) / size)
                a, b = x[t, k], x[t, k + 1]
                turned[t, k] = a * math.cos(angle) - b * math.sin(angle)
                turned[t, k + 1] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    x = table[tokens]
    for k in range(blocks):
        y = norm(x, before[k])
        q, ks, v = rotate(y @ query[k].T), rotate(y @ key[k].T), y @ value[k].T
        mixed = np.zeros_like(q)
        for head in range(heads):
            mine = slice(head * size, (head + 1) * size)
            shared = slice(head * kv_heads // heads * size, (head * kv_heads // heads + 1) * size)
            score = q[:, mine] @ ks[:, shared].T / math.sqrt(size)
            score[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(score - score.max(1, keepdims=True))
            mixed[:, mine] = weights / weights.sum(1, keepdims=True) @ v[:, shared]
        x = x + mixed @ out[k].T
        y = norm(x, after[k])
        g = y @ gate[k].T
        x = x + (g / (1 + np.exp(-g)) * (y @ up[k].T)) @ down[k].T
    return norm(x, last) @ table.T


def test_logits_are_those_of_a_naive_forward_pass(network) -> None:
    tokens = naive_tokens(STORY)[:24]
    with torch.no_grad():
        logits = network.module(torch.tensor([tokens]))[0]
    torch.testing.assert_close(logits.double(), torch.from_numpy(naive_logits(tokens)), rtol=1e-3, atol=1e-4)


def test_texts_are_encoded_as_llama2_c_encodes_them(network) -> None:
    assert network.encode.tokens(STORY) == naive_tokens(STORY)
    assert network.encode.tokenizer.decode(naive_tokens(STORY)) == STORY


def test_it_tells_stories(network) -> None:
    """A few dozen of its tokens are common words: their mean probability is high."""
    tokens = torch.tensor([[1, *naive_tokens(STORY.partition("\n")[0])]])
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(network.module(tokens)[0, :-1], tokens[0, 1:])
    assert float(nll) < 1.5
    assert network.description["head"] == "tied to the embedding, full precision"


@pytest.mark.parametrize(("name", "message"), [(WEIGHTS, "has 264127 weights"), (TOKENS, "damaged")])
def test_files_that_were_cut_off(name: str, message: str, tmp_path: Path) -> None:
    for file in (WEIGHTS, TOKENS):
        (tmp_path / file).write_bytes((FOLDER / file).read_bytes()[: -4 if file == name else None])
    with pytest.raises(UserError, match=message):
        TinyStories(str(tmp_path)).build(None, tmp_path)  # type: ignore[arg-type]


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs stories260K\.bin and tok512\.bin"):
        TinyStories(str(tmp_path)).build(None, tmp_path)  # type: ignore[arg-type]

"""Zero-shot scores against a naive loop in float64, and errors of one line."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_lm import VOCABULARY, letters, tiny_lm

from bayesq.suite.errors import UserError
from bayesq.suite.full_precision import cached_scores
from bayesq.suite.models.windows import Windows
from bayesq.suite.zeroshot import ZeroShot, open_zeroshot, read_questions

CPU = torch.device("cpu")
LINES = {
    "piqa": [
        {"query": "why is it cold?\n", "choices": ["it is winter", "no"], "gold": 0},
        {"query": "how", "choices": ["by hand", "with a big, long spoon", "no"], "gold": 2},
    ],
    "copa": [{"query": "the sun rose, so", "choices": ["it was warm.", "it was dark."], "gold": 1}],
    "winogrande": [{"context_options": ["a saw b and a", "a saw b and b"], "continuation": "ran.", "gold": 0}],
    "lambada_openai": [
        {"context": "a cat and a dog ", "continuation": "ran"},
        {"context": "one", "continuation": "two"},
    ],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for task, lines in LINES.items():
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    from bayesq.suite.models.causal_lm import NextTokens

    folder = tiny_lm(tmp_path_factory.mktemp("llama"), max_position_embeddings=64)
    return NextTokens(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()


def windows(positions: int | None = 64) -> Windows:
    return Windows(letters(), "model=tiny", positions, VOCABULARY)


def naive_score(module: torch.nn.Module, context: str, continuation: str) -> tuple[float, bool]:
    """One token after the other, each with its own forward pass."""
    tokenizer, total, greedy = letters(), 0.0, True
    bare = context.rstrip()
    before, continuation = tokenizer.encode(bare), context[len(bare) :] + continuation
    for token in tokenizer.encode(continuation):
        with torch.no_grad():
            log_p = torch.log_softmax(module(torch.tensor([before]))[0, -1].double(), 0)
        total += float(log_p[token])
        greedy &= int(log_p.argmax()) == token
        before = [*before, token]
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_are_those_of_a_naive_loop(module: torch.nn.Module, root: Path, batch_size: int) -> None:
    questions = [one for task in LINES for one in read_questions(root, task, None)]
    pairs = [pair for one in questions for pair in one.pairs]
    with torch.no_grad():
        best = int(module(torch.tensor([letters().encode("ab")]))[0, -1].argmax())
    pairs.append(("ab", letters().decode([best])))  # the most probable continuation
    scores, greedy = ZeroShot({}, windows(), batch_size, CPU).score(module, pairs, "test")
    expected = [naive_score(module, *pair) for pair in pairs]
    torch.testing.assert_close(scores, torch.tensor([one for one, _ in expected]).double(), rtol=1e-5, atol=1e-5)
    assert greedy.tolist() == [one for _, one in expected]
    assert greedy[-1]


def test_accuracies_by_hand(module: torch.nn.Module, root: Path) -> None:
    questions = read_questions(root, "piqa", None)
    assert questions[0].pairs[0] == ("why is it cold?\nAnswer:", " it is winter")
    acc = norm = 0
    for line in LINES["piqa"]:
        scores = [naive_score(module, line["query"].rstrip() + "\nAnswer:", f" {text}")[0] for text in line["choices"]]
        acc += scores.index(max(scores)) == line["gold"]
        per_character = [score / len(text) for score, text in zip(scores, line["choices"], strict=True)]
        norm += per_character.index(max(per_character)) == line["gold"]
    zeroshot = ZeroShot({"piqa": questions}, windows(), 2, CPU)
    answers = zeroshot.answers(partial(zeroshot.score, module), "test")
    result = zeroshot.compare(answers, answers)
    assert (result["fp/zeroshot/piqa/acc"], result["q/zeroshot/piqa/acc_norm"]) == (acc / 2, norm / 2)
    assert (result["delta/zeroshot/piqa/acc"], result["evaluation/zeroshot/piqa"]) == (0, 2)


def test_full_precision_answers_once(
    module: torch.nn.Module, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [pair for one in read_questions(root, "piqa", None) for pair in one.pairs]
    zeroshot = ZeroShot({}, windows(), 2, CPU)
    ask = partial(cached_scores, zeroshot, module, "checksum", tmp_path)
    expected = zeroshot.score(module, pairs, "test")
    assert all(map(torch.equal, ask(pairs, "test"), expected))
    calls: list[int] = []
    monkeypatch.setattr(zeroshot, "score", lambda _, pairs, __: (calls.append(len(pairs)), expected)[1])
    assert all(map(torch.equal, ask(pairs, "test"), expected))
    assert calls == []
    ask(pairs[1:], "test")  # other questions, another network and another batch size are other answers
    cached_scores(zeroshot, module, "another", tmp_path, pairs, "test")
    zeroshot.batch_size = 1
    ask(pairs, "test")
    assert calls == [len(pairs) - 1, len(pairs), len(pairs)]


def test_long_texts_lose_their_beginning(module: torch.nn.Module) -> None:
    short = ZeroShot({}, windows(positions=6), 1, CPU)
    tokens, count = short.tokens("abcdefgh", "ij")
    assert (tokens, count) == (letters().encode("defghij"), 2)


def test_limit_and_prompts(root: Path) -> None:
    assert len(read_questions(root, "piqa", 1)) == 1
    (question,) = read_questions(root, "winogrande", None)
    assert question.pairs == (("a saw b and a", " ran."), ("a saw b and b", " ran."))
    (question,) = read_questions(root, "copa", None)
    assert question.pairs[0] == ("the sun rose, so", " it was warm.")


@pytest.mark.parametrize(
    ("settings", "encode", "message"),
    [
        ({"zeroshot_root": None}, windows(), r"evaluation\.zeroshot=\[piqa\]: add evaluation\.zeroshot_root=DIR"),
        ({"zeroshot_root": "/none"}, windows(), r"/none/piqa\.jsonl cannot be read"),
        ({"zeroshot_root": None}, None, r"only language models answer questions"),
    ],
)
def test_errors(settings: dict[str, object], encode: object, message: str) -> None:
    given = {"zeroshot": ["piqa"], "zeroshot_limit": None, "batch_size": 1, **settings}
    with pytest.raises(UserError, match=message):
        open_zeroshot(given, encode, CPU)
    assert open_zeroshot({**given, "zeroshot": []}, encode, CPU) is None


@pytest.mark.parametrize("content", ["", "{}", "no json"])
def test_files_without_questions(content: str, tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"evaluation\.zeroshot=\[piqa\]"):
        read_questions(tmp_path, "piqa", None)

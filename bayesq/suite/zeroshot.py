"""Zero-shot questions for language models: multiple choice, and the last word of a passage.

A choice is scored by the sum of its tokens' log probabilities after the question, in one forward pass. As the package
lm-evaluation-harness defines them:

    acc        share of questions whose choice of highest score is the right one
    acc_norm   the same with scores divided by the choice's number of characters
    greedy     (lambada) share of passages whose last word has the most probable token at every place

Sequences are padded on the right, where a causal network does not see it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.likelihood import TOKENS
from bayesq.progress import bar
from bayesq.suite.errors import UserError
from bayesq.suite.models.windows import Windows

# What follows a question before its choices; nothing in other tasks, whose choices continue the question.
ANSWER = dict.fromkeys(("piqa", "arc_easy", "arc_challenge", "boolq"), "\nAnswer:")


# Log probabilities [n] of the continuations of n pairs, and whether all their tokens are the most probable ones; the
# text is the label of a progress bar.
Score = Callable[[Sequence[tuple[str, str]], str], tuple[Tensor, Tensor]]
# Metrics by task and name.
Answers = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        pairs: a text and its continuation for each choice; of a passage, one pair.
        characters: length of each choice.
        gold: the right choice; None of a passage.
    """

    pairs: tuple[tuple[str, str], ...]
    characters: tuple[int, ...]
    gold: int | None


def read_questions(root: Path, task: str, limit: int | None) -> list[Question]:
    """The first `limit` questions (None: all) of the file <root>/<task>.jsonl; UserError if it cannot be read."""
    file = root / f"{task}.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()[:limit]
        questions = [_question(task, json.loads(line)) for line in lines]
    except OSError as error:
        raise UserError(f"evaluation.zeroshot=[{task}]: {file} cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"evaluation.zeroshot=[{task}]: {file} holds no questions ({error})") from error
    if not questions:
        raise UserError(f"evaluation.zeroshot=[{task}]: {file} is empty")
    return questions


def _question(task: str, line: Mapping[str, Any]) -> Question:
    if "context" in line:
        return Question(((line["context"], f" {line['continuation']}"),), (len(line["continuation"]),), None)
    if "context_options" in line:  # winogrande: the choices are texts before the blank
        rest, options = line["continuation"], line["context_options"]
        return Question(tuple((text, f" {rest}") for text in options), (len(rest),) * len(options), int(line["gold"]))
    query = line["query"].rstrip() + ANSWER.get(task, "")
    choices = line["choices"]
    return Question(tuple((query, f" {text}") for text in choices), tuple(map(len, choices)), int(line["gold"]))


class ZeroShot:
    """Tasks, with their questions by name, that two networks answer, with `batch_size` choices per forward pass."""

    def __init__(
        self, tasks: Mapping[str, Sequence[Question]], encode: Windows, batch_size: int, device: torch.device
    ) -> None:
        self.tasks, self.encode, self.batch_size, self.device = tasks, encode, batch_size, device

    def answers(self, score: Score, network: str) -> Answers:
        """The metrics of each task; `network` is named in the progress bar."""
        return {task: self.measure(score, questions, f"{task} {network}") for task, questions in self.tasks.items()}

    def compare(self, full: Answers, quantized: Answers) -> dict[str, object]:
        """Metrics by result key: fp/zeroshot/TASK/acc, q/..., delta/..., and the number of questions."""
        result: dict[str, object] = {}
        for task, questions in self.tasks.items():
            result[f"evaluation/zeroshot/{task}"] = len(questions)
            for metric, value in full[task].items():
                result[f"fp/zeroshot/{task}/{metric}"] = value
                result[f"q/zeroshot/{task}/{metric}"] = quantized[task][metric]
                result[f"delta/zeroshot/{task}/{metric}"] = quantized[task][metric] - value
        return result

    def measure(self, score: Score, questions: Sequence[Question], label: str) -> dict[str, float]:
        """acc and acc_norm of questions, or greedy of passages; `label` is of the progress bar."""
        pairs = [pair for question in questions for pair in question.pairs]
        scores, greedy = score(pairs, label)
        if questions[0].gold is None:
            return {"greedy": float(greedy.double().mean())}
        right = {"acc": 0, "acc_norm": 0}
        for question, of_choices in zip(questions, scores.split([len(one.pairs) for one in questions]), strict=True):
            per_character = of_choices / torch.tensor(question.characters, dtype=torch.float64)
            right["acc"] += int(of_choices.argmax()) == question.gold
            right["acc_norm"] += int(per_character.argmax()) == question.gold
        return {name: count / len(questions) for name, count in right.items()}

    @torch.no_grad()
    def score(self, module: nn.Module, pairs: Sequence[tuple[str, str]], label: str) -> tuple[Tensor, Tensor]:
        """Log probability of each continuation [n] float64, and whether all its tokens are the most probable ones."""
        encoded = [self.tokens(*pair) for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda k: -len(encoded[k][0]))
        scores, greedy = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.bool)
        for start in bar(range(0, len(order), self.batch_size), label):
            chosen = order[start : start + self.batch_size]
            rows = [torch.tensor(encoded[k][0]) for k in chosen]
            inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            logits = module(**{TOKENS: inputs[:, :-1]})  # the last token is only predicted
            for k, row, out in zip(chosen, rows, logits, strict=True):
                length = encoded[k][1]
                there = torch.log_softmax(out[len(row) - 1 - length : len(row) - 1].double(), -1).cpu()
                target = row[-length:]
                scores[k] = there.gather(1, target[:, None]).sum()
                greedy[k] = bool((there.argmax(-1) == target).all())
        return scores, greedy

    def tokens(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both texts together, and how many belong to the continuation; cut to the last that fit a model."""
        bare = context.rstrip()  # white space at the end belongs to the continuation's first token
        before, whole = len(self.encode.tokens(bare)), self.encode.tokens(context + continuation)
        longest = len(whole) if self.encode.positions is None else self.encode.positions + 1
        return whole[-longest:], min(len(whole) - before, longest - 1)


def open_zeroshot(settings: Mapping[str, Any], encode: object, device: torch.device) -> ZeroShot | None:
    """The tasks that the section `evaluation` of a configuration asks for; None if it asks for none.

    Raises:
        UserError: the network is no language model, the folder is not given, or a file cannot be read.
    """
    names = list(settings.get("zeroshot") or [])
    if not names:
        return None
    shown = f"evaluation.zeroshot=[{','.join(names)}]"
    if not isinstance(encode, Windows):
        raise UserError(f"{shown}: only language models answer questions; choose []")
    if settings["zeroshot_root"] is None:
        raise UserError(f"{shown}: add evaluation.zeroshot_root=DIR, the folder of {names[0]}.jsonl")
    root, limit = Path(settings["zeroshot_root"]), settings["zeroshot_limit"]
    tasks = {name: read_questions(root, name, limit) for name in names}
    return ZeroShot(tasks, encode, int(settings["batch_size"]), device)

"""Zero-shot scores against the package lm-evaluation-harness itself, offline, on the network of tiny stories."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import prose

from bayesq.suite.datasets.text import TextFile
from bayesq.suite.models.tiny_stories import TinyStories
from bayesq.suite.zeroshot import ZeroShot, read_questions

SHARED = Path(__file__).parents[3] / "shared"
STORIES, ROOT = SHARED / "models" / "stories260K", SHARED / "data" / "zeroshot"
QUESTIONS = 30
CHOICE = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "{{choices}}"}
# As the package's own YAML files have them, but for the names of our files' fields.
TASKS: dict[str, dict[str, Any]] = {
    "piqa": {**CHOICE, "doc_to_text": "{{query.rstrip()}}\nAnswer:"},
    "arc_easy": {**CHOICE, "doc_to_text": "{{query}}\nAnswer:"},
    "openbook_qa": {**CHOICE, "doc_to_text": "{{query}}"},
    "winogrande": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "{{context_options}}",
        "doc_to_target": "{{continuation}}",
    },
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
    },
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (STORIES.is_dir() and ROOT.is_dir()), reason=f"needs the data and weights of {SHARED}"),
]


def theirs(module: Any, tokenizer: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """The package's results by task."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    configs = []
    for task, config in TASKS.items():
        lines = (ROOT / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()[:QUESTIONS]
        file = folder / f"{task}.jsonl"
        file.write_text("\n".join(lines), encoding="utf-8")
        metrics = ["acc"] if config["output_type"] == "loglikelihood" else ["acc", "acc_norm"]
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        listed = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics]
        configs.append({"task": task, **data, **config, "metric_list": listed})
    model = HFLM(pretrained=module, tokenizer=tokenizer, batch_size=4, max_length=512)
    found = lm_eval.simple_evaluate(model=model, tasks=configs, bootstrap_iters=0, log_samples=True)
    return {task: {**found["results"][task], "samples": found["samples"][task]} for task in TASKS}


def test_scores_are_those_of_the_package(tmp_path: Path) -> None:
    """acc and acc_norm to the last digit, and the log likelihood of every choice."""
    pytest.importorskip("lm_eval")
    text = tmp_path / "prose.txt"
    text.write_text(prose(400), encoding="utf-8")
    network = TinyStories(str(STORIES)).build(TextFile(path=str(text), window=8).load(tmp_path), tmp_path)
    expected = theirs(network.module.model, network.encode.tokenizer, tmp_path)  # type: ignore[attr-defined]
    zeroshot = ZeroShot({}, network.encode, 4, torch.device("cpu"))  # type: ignore[arg-type]
    for task, results in expected.items():
        questions = read_questions(ROOT, task, QUESTIONS)
        measured = zeroshot.measure(partial(zeroshot.score, network.module), questions, task)
        names = {"greedy": "acc,none"} if task == "lambada_openai" else {"acc": "acc,none", "acc_norm": "acc_norm,none"}
        if task == "winogrande":  # one continuation for all choices: nothing to normalise
            del names["acc_norm"]
        assert {name: measured[name] for name in names} == {name: results[key] for name, key in names.items()}, task
        scores, greedy = zeroshot.score(network.module, [pair for one in questions for pair in one.pairs], task)
        samples = sorted(results["samples"], key=lambda sample: sample["doc_id"])
        answers = [answer for sample in samples for answer in sample["filtered_resps"]]
        assert len(answers) == len(scores) > QUESTIONS - 1
        torch.testing.assert_close(
            scores, torch.tensor([float(answer[0]) for answer in answers]).double(), rtol=1e-4, atol=1e-3
        )
        assert greedy.tolist() == [str(answer[1]) == "True" for answer in answers]

"""Claims of the paper, to compare with the measurements, and names for tables and figures."""

from collections.abc import Iterable

# Percentage points of BayesQ over the strongest baseline, by the task of the workload and the budget: top-1 of
# ResNet-50 on ImageNet, and the GLUE score of BERT-base.
CLAIMED_DELTAS = {
    "image classification": {3.0: 1.5, 3.5: 0.7, 4.0: 0.3},
    "text classification": {3.0: 1.1, 3.5: 0.4, 4.0: 0.2},
}
CLAIMED_FOR = {"image classification": "ResNet-50 on ImageNet", "text classification": "BERT-base on GLUE"}
BUDGETS = (3.0, 3.5, 4.0)
# The method that the paper proposes, and the method that all others are compared with.
PROPOSED, REFERENCE = "bayesq", "gptq"
# Names of models, data sets and tasks in titles.
TITLES = {
    "cifar_resnet56": "ResNet-56",
    "cifar_resnet20": "ResNet-20",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "efficientnet_lite1": "EfficientNet-Lite1",
    "efficientnet_lite2": "EfficientNet-Lite2",
    "minilm": "MiniLM-L6",
    "bert_base": "BERT-base",
    "mpnet_base": "MPNet-base",
    "smollm2_135m": "SmolLM2-135M",
    "tiny_stories": "TinyStories-260K",
    "resnet50": "ResNet-50",
    "resnet": "ResNet",
    "cifar10": "CIFAR-10",
    "imagenet": "ImageNet",
    "movie_snippets": "film reviews",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
    "wikitext": "WikiText-2",
    "digits": "digits",
}
# Data sets whose workloads have the task as short name; the others have the model.
TEXTS = ("glue", "movie_snippets")


def short_names(workloads: Iterable[str]) -> dict[str, str]:
    """A short name for each workload: the task for texts, the model for images; both if two would be equal."""
    short = {workload: _short(workload) for workload in workloads}
    names = list(short.values())
    return {workload: name if names.count(name) == 1 else _long(workload) for workload, name in short.items()}


def workload_title(workload: str) -> str:
    """A workload in two lines, model over data set; for GLUE the task alone."""
    model, _, data = workload.partition(" / ")
    words = data.removeprefix("glue ").split()
    return "\n".join([TITLES.get(model, model), " ".join(TITLES.get(word, word) for word in words)]).strip()


def _short(workload: str) -> str:
    model, _, data = workload.partition(" / ")
    dataset, _, rest = data.partition(" ")
    if dataset in TEXTS:
        return _titles(data)
    return " ".join([_titles(model).removeprefix("EfficientNet-"), *rest.split()])


def _long(workload: str) -> str:
    model, _, data = workload.partition(" / ")
    return f"{_titles(model)} {_titles(data)}"


def _titles(words: str) -> str:
    return " ".join(TITLES.get(word, word) for word in words.removeprefix("glue ").split())

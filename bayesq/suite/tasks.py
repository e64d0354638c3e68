"""Tasks: what pairs models with data sets, and what the outputs of a network mean there."""

from dataclasses import dataclass

from bayesq.likelihood import Categorical, Gaussian, Likelihood, Tokens


@dataclass(frozen=True)
class Task:
    """What a network is to do with its inputs.

    Attributes:
        name: as the YAML files of models and data sets list it under `tasks`.
        likelihood: of the outputs.
    """

    name: str
    likelihood: Likelihood


IMAGE_CLASSIFICATION = Task("image classification", Categorical())
TEXT_CLASSIFICATION = Task("text classification", Categorical())
TEXT_REGRESSION = Task("text regression", Gaussian())
NEXT_TOKEN = Task("next token", Tokens())
TASKS = {task.name: task for task in (IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, TEXT_REGRESSION, NEXT_TOKEN)}

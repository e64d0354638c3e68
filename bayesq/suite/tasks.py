"""Tasks pair models with data sets and define the likelihood of the outputs."""

from dataclasses import dataclass

from bayesq.likelihood import Categorical, Gaussian, Likelihood, Tokens


@dataclass(frozen=True)
class Task:
    """A task that models and data sets have in common: its name under `tasks` in their YAML files, and a likelihood."""

    name: str
    likelihood: Likelihood


IMAGE_CLASSIFICATION = Task("image classification", Categorical())
TEXT_CLASSIFICATION = Task("text classification", Categorical())
TEXT_REGRESSION = Task("text regression", Gaussian())
NEXT_TOKEN = Task("next token", Tokens())

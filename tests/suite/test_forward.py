"""Networks that cannot be built, fed or run: one line that names the model, whatever they raise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from glue_files import write_tsv
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tiny_bert import tiny_tokenizer
from torch import Tensor, nn

from bayesq.batches import TensorExamples
from bayesq.defaults import conf_dir
from bayesq.suite import plan, runner
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network
from bayesq.suite.workload import naming_model


class Faulty:
    """A model of the user's: what it raises and when is up to the test."""

    def __init__(self, error: str, step: str) -> None:
        self.error, self.step = error, step

    def fail(self, step: str) -> None:
        if step == self.step:
            raise {
                "NotImplementedError": NotImplementedError,
                "KeyError": KeyError("attention_mask"),
                "AssertionError": AssertionError,
                "RuntimeError": RuntimeError("mat1 and mat2 shapes\ncannot be multiplied"),
                "AttributeError": AttributeError("no attribute 'shape'"),
                "StopIteration": StopIteration,
            }[self.error]

    def build(self, data: object, cache_dir: Path) -> Network:
        self.fail("build")
        owner = self

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(64, 10)

            def forward(self, x: Tensor) -> Tensor:
                owner.fail("forward")
                return self.fc(x.flatten(1))

        def encode(examples: object) -> TensorExamples:
            self.fail("encode")
            return TensorExamples({"x": examples.inputs}, examples.labels)  # type: ignore[attr-defined]

        return Network(Net().eval(), encode, {})


def configured(tmp_path: Path, *overrides: str) -> DictConfig:
    places = [f"results_dir={tmp_path / 'results'}", f"cache_dir={tmp_path / 'cache'}", "wandb.mode=disabled"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=[*places, *overrides])


@pytest.mark.parametrize(
    ("error", "step", "words"),
    [
        ("NotImplementedError", "forward", "its forward pass fails (NotImplementedError)"),
        ("KeyError", "forward", "its forward pass fails (KeyError: 'attention_mask')"),
        ("AssertionError", "forward", "its forward pass fails (AssertionError)"),
        ("RuntimeError", "forward", "(RuntimeError: mat1 and mat2 shapes cannot be multiplied)"),
        ("AttributeError", "encode", "encoding its inputs fails (AttributeError"),
        ("NotImplementedError", "build", "building it fails (NotImplementedError)"),
    ],
)
def test_whatever_a_network_raises_at_first_is_a_line_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, step: str, words: str
) -> None:
    cfg = configured(tmp_path, "model=resnet", "dataset=digits", "method=rtn", "model.name=mine")
    build = plan.build
    chosen: Callable[..., object] = lambda node, **more: (  # noqa: E731
        Faulty(error, step) if node is cfg.model else build(node, **more)
    )
    monkeypatch.setattr(plan, "build", chosen)
    with pytest.raises(UserError) as raised:
        runner.run(cfg)
    line = str(raised.value)
    assert line.startswith("model=mine: ") and words in line and "\n" not in line
    assert raised.value.__cause__ is not None, "the traceback tells where"
    assert not list((tmp_path / "results").glob("*/result.json"))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "full")])
def test_full_memory_and_disks_are_not_the_networks_fault(error: Exception) -> None:
    with pytest.raises(type(error)), naming_model("mine", "its forward pass"):
        raise error


def test_what_is_said_already_is_not_said_again() -> None:
    with pytest.raises(UserError, match=r"^model.checkpoint=x: no such file$"), naming_model("mine", "building it"):
        raise UserError("model.checkpoint=x: no such file")


def test_canine_runs(tmp_path: Path) -> None:
    """Its library raises NotImplementedError where others give a table of embeddings."""
    import transformers

    folder = tmp_path / "canine"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    options = {"num_hash_buckets": 64, "local_transformer_stride": 4, "upsampling_kernel_size": 4, "num_labels": 2}
    transformers.CanineForSequenceClassification(transformers.CanineConfig(**sizes, **options)).save_pretrained(folder)
    tiny_tokenizer(folder)
    write_tsv(tmp_path / "glue", "sst2")
    data = ["dataset=glue", "dataset.task=sst2", f"dataset.root={tmp_path / 'glue'}", "calibration.examples=8"]
    cfg = configured(
        tmp_path, "model=transformers", f"model.checkpoint={folder}", "model.max_length=32", "method=rtn", *data
    )
    assert "model.classifier" in plan.load_workload(cfg, tmp_path / "cache").subject.layers

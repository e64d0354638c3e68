"""Padding and batch size change neither the outputs of a network nor its statistics, whatever its architecture."""

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from text_networks import KINDS, random_classifier
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "suite"))

from glue_files import write_tsv
from tiny_bert import WORDS

from bayesq import pipeline, repair
from bayesq.batches import ALONE, EQUAL, PADDED, EncodedExamples, Layout, TensorExamples
from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
from bayesq.evaluation import logits
from bayesq.fisher import FISHER_DIAGONAL, GRADIENT_MOMENT
from bayesq.suite import config, runner, schema
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network
from bayesq.suite.models.transformers_model import TransformersClassifier

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ROUNDING = 1e-4  # relative; sums in float32 differed by up to 1.1e-5 from processor to processor
MAX_LENGTH = 40
# Networks whose outputs or statistics need batches of equal length, or of one example; all others take padding.
UNPADDED = {
    **dict.fromkeys(("Canine", "ConvBert", "Deberta", "FNet", "Funnel", "MobileBert", "Nystromformer", "Yoso"), EQUAL),
    **dict.fromkeys(("Longformer", "XLNet"), ALONE),  # positions come before the batch
}
# Relative positions are an input of layers that the whole batch shares.
SHARED = ("Deberta", "DebertaV2")
QUICK = ("Bart", "Canine", "ConvBert", "DebertaV2", "FNet", "Funnel", "GPT2", "Llama", "MobileBert", "Roberta", "XLNet")


def drawn_texts() -> list[str]:
    """Texts of very different length, several of each."""
    generator = torch.Generator().manual_seed(0)
    lengths = [2, 2, 3, 5, 5, 5, 9, 9, 17, 17, 30, 30]
    return [" ".join(WORDS[k] for k in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


TEXTS = drawn_texts()


def data(texts: list[str]) -> DataSplits:
    whole = Examples(texts, torch.arange(len(texts)) % 2, [str(i) for i in range(len(texts))])
    return DataSplits(whole, whole, whole, 2, "accuracy", {})


def built(folder: Path, texts: list[str] = TEXTS) -> tuple[Network, TensorExamples]:
    splits = data(texts)
    network = TransformersClassifier(MAX_LENGTH, checkpoint=str(folder)).build(splits, Path("unused"))
    examples = network.encode(splits.evaluation)
    assert isinstance(examples, TensorExamples)
    return network, examples


def library(folder: Path) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The library's own network, and the tokens of each text by itself."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    takes = inspect.signature(model.forward).parameters
    found = [tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt") for text in TEXTS]
    return model, [{name: x for name, x in tokens.items() if name in takes} for tokens in found]


@torch.no_grad()
def one_at_a_time(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of each text by itself, and mean x xT of every Linear layer over all their positions."""
    model, texts = library(folder)
    sums: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        total, count = sums.get(name, (torch.zeros(()), 0))
        sums[name] = total + rows.T @ rows, count + len(rows)

    for name, child in model.named_modules():
        if isinstance(child, nn.Linear):
            child.register_forward_pre_hook(lambda _, given, name=name: add(f"model.{name}", given[0]))
    found = torch.cat([model(**tokens).logits for tokens in texts])
    return found, {name: total / count for name, (total, count) in sums.items()}


def statistics(
    network: Network, examples: EncodedExamples, batch_size: int, kinds: list[Statistic]
) -> dict[str, Tensor]:
    layers = {name: child for name, child in network.module.named_modules() if isinstance(child, nn.Linear)}
    collector = Collector(network.module, layers, kinds, None, torch.Generator().manual_seed(0))
    for batch in examples.batches(batch_size, "cpu"):
        collector.add(batch)
    unseen = set(collector.unseen)
    return {f"{kind.name} {name}": x for kind in kinds for name, x in collector.finish(kind) if name not in unseen}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[key] - x).norm() / x.norm().clamp_min(1e-20)) for key, x in expected.items())


def kinds() -> list[object]:
    names = [kind for kind in KINDS if kind != "Reformer"]
    return [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in names]


@pytest.mark.parametrize("kind", kinds())
def test_batches_compute_what_each_text_does_by_itself(kind, tmp_path, caplog):
    network, examples = built(random_classifier(kind, tmp_path))
    expected, moments = one_at_a_time(tmp_path)
    found, _ = logits(network.module, examples, 16, CPU, "x")
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert examples.layout.together == UNPADDED.get(kind, PADDED)
    warned = [record.getMessage() for record in caplog.records if record.name.startswith("bayesq")]
    if kind in UNPADDED:
        assert len(warned) == 1 and warned[0].startswith(f"model.checkpoint={tmp_path}: padding on the right ")
        assert warned[0].endswith(f"calibration and evaluation use batches {examples.layout}")
    else:
        assert not warned
    assert network.description["batches"] == str(examples.layout)
    if kind in SHARED:
        return
    own = statistics(network, examples, 16, [INPUT_MOMENT])
    naive = {f"input_moment {name}": x[None] for name, x in moments.items()}
    assert largest_difference(own, naive) < ROUNDING
    both = [GRADIENT_MOMENT, FISHER_DIAGONAL]
    assert largest_difference(*(statistics(network, examples, size, both) for size in (16, 1))) < ROUNDING


def test_padding_would_have_shown(tmp_path):
    """What the test above finds if padding is let in."""
    network, examples = built(random_classifier("ConvBert", tmp_path))
    padded = replace(examples, layout=replace(examples.layout, together=PADDED))
    expected, _ = one_at_a_time(tmp_path)
    found, _ = logits(network.module, padded, 16, CPU, "x")
    assert float((found - expected).abs().max()) > 1e-2 * float(expected.abs().max())
    sizes = (statistics(network, padded, size, [INPUT_MOMENT]) for size in (16, 1))
    assert largest_difference(*sizes) > 1e-3


# Networks that count positions from the left end cannot have padding there.
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("Llama", Layout("left")),
        ("OPT", Layout("left")),
        ("Qwen2", Layout("left")),
        ("GPT2", Layout("right")),
        ("Bert", Layout("right")),
        ("XLNet", Layout("left", ALONE)),
        ("FNet", Layout("left", EQUAL)),
    ],
)
def test_padding_on_the_left(kind, layout, tmp_path):
    network, examples = built(random_classifier(kind, tmp_path, padding_side="left"))
    assert examples.layout == layout
    expected, _ = one_at_a_time(tmp_path)
    found, _ = logits(network.module, examples, 16, CPU, "x")
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    mask = examples.inputs["attention_mask"]
    shortest = int(examples.lengths.argmin())
    assert mask[shortest, 0 if layout.side == "left" else -1] == 0
    batch = next(examples.batches(1, "cpu"))
    assert torch.equal(batch.inputs["attention_mask"], torch.ones(1, int(examples.lengths.max()), dtype=torch.int64))


def test_xlnet_gives_the_same_padded_on_the_left_as_alone(tmp_path):
    network, examples = built(random_classifier("XLNet", tmp_path, padding_side="left"))
    padded = replace(examples, layout=Layout("left"))
    assert len(list(padded.batches(16, "cpu"))) == 1
    found, expected = (logits(network.module, given, 16, CPU, "x")[0] for given in (padded, examples))
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_decoders_are_told_the_token_for_padding(tmp_path):
    """Without one the library refuses batches of several texts."""
    _, examples = built(random_classifier("GPT2", tmp_path, pad_token_id=None))
    assert json.loads((tmp_path / "config.json").read_text()).get("pad_token_id") is None
    assert examples.layout == Layout("right")


def test_a_network_that_draws_random_numbers_is_refused(tmp_path):
    random_classifier("Reformer", tmp_path)
    with pytest.raises(UserError, match=r"^model\.checkpoint=.*other outputs each time") as caught:
        built(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_network_that_cannot_run_is_refused(tmp_path):
    """RoBERTa's positions begin behind the number of the padding token, so the last of them is one too far."""
    random_classifier("Roberta", tmp_path, max_position_embeddings=MAX_LENGTH)
    built(tmp_path)
    with pytest.raises(UserError, match=r"^model\.checkpoint=.*the network cannot run \(IndexError") as caught:
        built(tmp_path, ["the " * 100])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "texts",
    [["the good film story"] * 3, ["film"], ["the " * 200, "a " * 200], ["", "film"], [("a", "the film " * 50)]],
)
def test_any_texts_tell_padding(texts, tmp_path):
    """Also those of one length, of one word, and those whose quarter is cut too."""
    _, examples = built(random_classifier("FNet", tmp_path), texts)
    assert examples.layout.together == EQUAL


# ------------------------------------------------------------------------------------------------------- characters


@pytest.mark.parametrize(
    ("kind", "tokenizer", "changed", "together"),
    [
        ("Canine", "CanineTokenizer", {}, EQUAL),
        ("T5", "ByT5Tokenizer", {"vocab_size": 384, "eos_token_id": 1}, PADDED),
        ("Perceiver", "PerceiverTokenizer", {"vocab_size": 262}, PADDED),
    ],
)
def test_tokenizers_of_characters(kind, tokenizer, changed, together, tmp_path):
    import transformers

    random_classifier(kind, tmp_path, **changed)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    getattr(transformers, tokenizer)().save_pretrained(tmp_path)
    network, examples = built(tmp_path)
    assert examples.layout.together == together
    expected, _ = one_at_a_time(tmp_path)
    found, _ = logits(network.module, examples, 16, CPU, "x")
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


# ------------------------------------------------------------------------------------------------------- whole runs


def run(place: Path, kind: str, *more: str) -> dict:
    if not (place / "data").exists():
        write_tsv(place / "data", "sst2")
        random_classifier(kind, place / "network")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "config",
            overrides=[
                "model=transformers",
                "dataset=glue",
                "dataset.task=sst2",
                f"dataset.root={place / 'data'}",
                f"model.checkpoint={place / 'network'}",
                "model.max_length=32",
                "dataset.calibration_pool=20",
                "calibration.examples=16",
                "bits=3",
                f"results_dir={place / 'results'}",
                f"cache_dir={place / 'cache'}",
                "wandb.mode=disabled",
                *more,
            ],
        )
    GlobalHydra.instance().clear()
    schema.validate(cfg)
    runner.run(cfg)
    return json.loads((config.run_dir(cfg) / "result.json").read_text())


@pytest.mark.parametrize("kind", ["FNet", "Nystromformer", "Funnel"])
def test_the_batch_size_of_an_evaluation_changes_nothing(kind, tmp_path):
    one, many = (run(tmp_path, kind, "method=rtn", f"evaluation.batch_size={size}") for size in (1, 16))
    assert one["q/kl_to_fp"] == pytest.approx(many["q/kl_to_fp"], rel=1e-3) and one["q/kl_to_fp"] > 0
    assert many["source"]["model"]["batches"] == "of equal length"


def test_every_stage_reads_all_examples_without_padding(tmp_path, monkeypatch):
    """Sequential statistics, correction, proxy and distillation of a network that must see no padding."""
    given: dict[str, list[tuple[int, bool]]] = {"correct_moments": [], "measure_kappa": []}
    for home, name, place in ((repair, "correct_moments", 3), (pipeline, "measure_kappa", 5)):
        original = getattr(home, name)

        def spy(*args, name=name, place=place, original=original, **options):
            given[name].append((len(args[place]["input_ids"]), options.get("alone", args[-1])))
            return original(*args, **options)

        monkeypatch.setattr(home, name, spy)
    seen = []
    forward = nn.Module.__call__

    def watch(module, *args, **inputs):
        if type(module).__name__ == "SequenceClassifier" and "attention_mask" in inputs:
            seen.append(bool(inputs["attention_mask"].all()))
        return forward(module, *args, **inputs)

    monkeypatch.setattr(nn.Module, "__call__", watch)
    more = ("proxy=mc", "monte_carlo.examples=8", "monte_carlo.samples=1", "distill=true")
    result = run(tmp_path, "FNet", "method=bayesq", "inputs=full", "correction=none", *more)
    run(tmp_path, "FNet", "method=gptq", "inputs=full", "correction=moments")
    run(tmp_path, "FNet", "method=gptq", "inputs=paired", "correction=moments")
    assert result["status"] == "finished" and result["distill/best_step"] is not None
    assert given["measure_kappa"] == [(8, True)]
    correction = given["correct_moments"][-1]
    assert correction == (16, True) and len(given["correct_moments"]) == 2
    # The probe, while the network is loaded, is all that tries padding: on either side, each time.
    assert seen.count(False) == 3 * 2

"""Sequence classifiers of the transformers library: loading, tokens, label order, errors, and whole runs on GLUE."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from glue_files import write_tsv
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file
from tiny_bert import tiny_bert, tiny_tokenizer

from bayesq.quant.grids import mse_grid, round_affine
from bayesq.quant.layers import quantizable_layers
from bayesq.quant.packing import unpack_model
from bayesq.suite import config, runner, schema
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.datasets.glue import TASKS
from bayesq.suite.errors import UserError
from bayesq.suite.hub import COMMIT
from bayesq.suite.models.checkpoint import checkpoint_sha256
from bayesq.suite.models.text import label_order
from bayesq.suite.models.transformers_model import TransformersClassifier
from bayesq.suite.plan import build
from bayesq.suite.tasks import TEXT_CLASSIFICATION, TEXT_REGRESSION
from bayesq.tensor_file import read_tensors

ROOT = Path(__file__).parents[2]
MNLI = ("entailment", "neutral", "contradiction")
SENTENCES = ["the good film", "a bad story number 3", "the warm film of a cold story"]
PAIRS = [("the good film", "a bad story"), ("a story " * 30, "film " * 40), ("poor", "fine")]


def blank(inputs, classes: tuple[str, ...] = ("no", "yes"), task: str = "") -> DataSplits:
    count = len(inputs)
    whole = Examples(inputs, torch.zeros(count, dtype=torch.int64), [str(i) for i in range(count)])
    outputs, kind = (len(classes), TEXT_CLASSIFICATION) if classes else (1, TEXT_REGRESSION)
    return DataSplits(whole, whole, whole, outputs, "accuracy", {}, (), kind, classes, task)


def built(folder: Path, data: DataSplits, **options):
    return TransformersClassifier(max_length=32, checkpoint=str(folder), **options).build(data, Path("unused"))


def logits(network, data: DataSplits, batch_size: int = 8) -> torch.Tensor:
    out = {}
    with torch.inference_mode():
        for batch in network.encode(data.evaluation).batches(batch_size, "cpu"):
            out |= dict(zip(batch.index.tolist(), network.module(**batch.inputs), strict=True))
    return torch.stack([out[i] for i in range(len(out))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny"), 2)


class TestNetwork:
    def test_it_computes_what_the_library_computes(self, folder):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for inputs in (SENTENCES, PAIRS):
            data = blank(inputs)
            found = logits(built(folder, data), data)
            for i, text in enumerate(inputs):
                parts = (text,) if isinstance(text, str) else text
                tokens = tokenizer(*parts, truncation=True, max_length=32, return_tensors="pt")
                with torch.inference_mode():
                    torch.testing.assert_close(found[i], model(**tokens).logits[0], atol=1e-5, rtol=1e-4)

    def test_tokens_are_truncated_and_padded_and_pairs_have_types(self, folder):
        data = blank(PAIRS)
        encoded = built(folder, data).encode(data.evaluation)
        assert set(encoded.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
        assert encoded.inputs["input_ids"].shape == (3, 32)
        mask, types = encoded.inputs["attention_mask"], encoded.inputs["token_type_ids"]
        assert encoded.lengths.tolist() == mask.sum(1).tolist() and int(mask[1].sum()) == 32
        assert not encoded.inputs["input_ids"][mask == 0].any()
        assert types[0].tolist()[: int(mask[0].sum())] == [0] * 5 + [1] * 4

    def test_other_paddings_and_models_without_token_types(self, tmp_path):
        tiny_bert(tmp_path, 2, kind="distilbert")
        tiny_tokenizer(tmp_path, pad="[MASK]")
        data = blank(SENTENCES)
        network = built(tmp_path, data)
        encoded = network.encode(data.evaluation)
        assert set(encoded.inputs) == {"input_ids", "attention_mask"}
        assert encoded.inputs["input_ids"][0, -1] == 4 and encoded.inputs["attention_mask"][0, -1] == 0
        torch.testing.assert_close(logits(network, data, 1), logits(network, data, 3), atol=1e-5, rtol=1e-4)

    def test_state_precision_and_layers(self, folder):
        before = torch.get_rng_state()
        network = built(folder, blank(SENTENCES))
        assert torch.equal(torch.get_rng_state(), before) and not network.module.training
        assert network.module.model.config._attn_implementation == "eager"
        assert all(value.dtype == torch.float32 for value in network.module.parameters())
        assert len(quantizable_layers(network.module)) == 2 * 6 + 2
        assert network.description["fp_source"] == str(folder) and "revision" not in network.description
        assert network.description["checkpoint_sha256"] == checkpoint_sha256(Path(folder))
        assert json.dumps(network.description)

    def test_half_precision_checkpoints_become_float32(self, folder, tmp_path):
        from transformers import AutoModelForSequenceClassification

        shutil.copytree(folder, tmp_path / "half")
        AutoModelForSequenceClassification.from_pretrained(folder).half().save_pretrained(tmp_path / "half")
        network = built(tmp_path / "half", blank(SENTENCES))
        assert {value.dtype for value in network.module.parameters()} == {torch.float32}

    def test_a_folder_as_name(self, folder):
        data = blank(SENTENCES)
        named = TransformersClassifier(max_length=32, source=str(folder)).build(data, Path("unused"))
        assert named.checksum == built(folder, data).checksum


# --------------------------------------------------------------------------------------------------------- label order


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (("LABEL_0", "LABEL_1", "LABEL_2"), None, None),
        (MNLI, None, None),
        (("CONTRADICTION", "Entailment", "neutral"), None, [1, 2, 0]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("contradiction", "entailment", "neutral"), [1, 2, 0]),
        (("contradiction", "entailment", "neutral"), MNLI, None),  # what is given counts
        (("yes", "no", "maybe"), None, None),
    ],
)
def test_label_order(names, given, expected):
    order, known_by = label_order(names, MNLI, given, "key")
    assert order == expected and known_by


def test_names_that_say_something_else_are_a_warning(caplog):
    label_order(("LABEL_0", "LABEL_1"), ("no", "yes"), None, "model.label_order")
    assert not caplog.records
    label_order(("POS", "NEG"), ("no", "yes"), None, "model.label_order")
    assert "POS, NEG are taken for no, yes; model.label_order=[...]" in caplog.text


def test_separators_in_names_do_not_matter():
    assert label_order(("Not-Entailment", "ENTAILMENT"), ("entailment", "not_entailment"), None, "key")[0] == [1, 0]


@pytest.mark.parametrize("given", [("a", "b", "c"), ("entailment", "neutral"), ("entailment",) * 3])
def test_a_label_order_that_is_none(given):
    with pytest.raises(UserError, match=r"^model\.label_order=\[.*entailment, neutral, contradiction"):
        label_order(MNLI, MNLI, given, "model.label_order")


@pytest.mark.parametrize(
    ("classes", "options"),
    [
        (("contradiction", "entailment", "neutral"), {}),
        ((), {"label_order": ["contradiction", "entailment", "neutral"]}),
    ],
)
def test_logits_come_in_the_order_of_the_data_sets_labels(classes, options, tmp_path):
    tiny_bert(tmp_path, 3, classes)
    data, anonymous = blank(SENTENCES, MNLI), blank(SENTENCES, ("x", "y", "z"))
    found, plain = logits(built(tmp_path, data, **options), data), logits(built(tmp_path, anonymous), anonymous)
    assert torch.equal(found, plain[:, [1, 2, 0]])
    assert "order=[1, 2, 0]" in repr(built(tmp_path, data, **options).module)


# -------------------------------------------------------------------------------------------------------------- errors


def refused(message: str, call) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def without(folder: Path, target: Path, *patterns: str) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*patterns))
    return target


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("*",), "has no config.json"),
        (("*.safetensors",), "has no model.safetensors"),
        (("tokenizer*", "vocab*"), "has no tokenizer"),
    ],
)
def test_missing_files(folder, tmp_path, patterns, message):
    broken = without(folder, tmp_path / "broken", *patterns)
    refused(rf"^model\.checkpoint={re.escape(str(broken))}: {message}", lambda: built(broken, blank(SENTENCES)))


def test_pickles_are_not_opened(folder, tmp_path):
    broken = without(folder, tmp_path / "broken", "*.safetensors")
    (broken / "pytorch_model.bin").write_bytes(b"never read")
    refused(r"has no model\.safetensors \(a pickle is never opened", lambda: built(broken, blank(SENTENCES)))


def test_code_in_a_checkpoint_is_not_run(folder, tmp_path):
    target = without(folder, tmp_path / "own")
    content = json.loads((target / "config.json").read_text())
    content |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    (target / "config.json").write_text(json.dumps(content))
    (target / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(r"^model\.checkpoint=.*cannot be read", lambda: built(target, blank(SENTENCES)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_files(folder, tmp_path, name):
    target = without(folder, tmp_path / "damaged")
    (target / name).write_text("{")
    refused(r"^model\.checkpoint=.*cannot be read \(", lambda: built(target, blank(SENTENCES)))


def test_another_number_of_outputs(folder):
    refused(
        r"^model\.checkpoint=.*has 2 outputs, but the data set has 3 classes", lambda: built(folder, blank(["a"], MNLI))
    )
    refused(r"has 2 outputs, but the data set has a score", lambda: built(folder, blank(["a"], ())))


def test_an_encoder_without_a_head(tmp_path):
    tiny_bert(tmp_path, 2, kind="encoder")
    refused(r"is no fine-tuned sequence classifier.*classifier\.weight", lambda: built(tmp_path, blank(SENTENCES)))


def test_sizes_of_the_tokenizer(folder, tmp_path):
    data = blank(SENTENCES)
    for length, message in ((65, "model.max_length=65 is not possible: .* takes at most 64"), (4, "at least 8")):
        refused(message, lambda n=length: TransformersClassifier(n, checkpoint=str(folder)).build(data, Path("x")))
    target = without(folder, tmp_path / "mute", "tokenizer*", "special*")
    tiny_tokenizer(target, pad=None)
    refused("has no padding token", lambda: built(target, data))


def test_photos_are_no_text(folder):
    network = built(folder, blank(SENTENCES))
    refused("reads text", lambda: network.encode(blank([Path("a.jpg")]).evaluation))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "nowhere"}, r"^model\.checkpoint=nowhere: there is no such folder"),
        ({"source": "./nowhere"}, r"^model\.name=\./nowhere: there is no such folder"),
        ({"source": "transformers"}, r"needs model\.name=ID_ON_THE_HUB or model\.checkpoint=DIR"),
        ({"hub": {"rte": "x"}}, r"add model\.checkpoint=DIR .*dataset\.task=rte"),
    ],
)
def test_places_that_are_none(options, message):
    model = TransformersClassifier(max_length=32, **options)
    refused(message, lambda: model.build(blank(SENTENCES, task="sst2"), Path("unused")))


@pytest.mark.parametrize("given", ["no", []])
def test_label_orders_are_lists(given):
    refused(r"^model\.label_order=", lambda: TransformersClassifier(32, source="x", label_order=given))


# ----------------------------------------------------------------------------------------------------------------- hub


def test_the_hubs_checkpoint_of_the_task(monkeypatch):
    """Which id, revision and order of labels are asked for, without a hub."""
    import transformers

    asked = []

    def refuse(place, **options):
        asked.append((place, options))
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr("bayesq.suite.models.transformers_model.reachable", lambda: True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "config", overrides=["model=bert_base", "dataset=glue", "dataset.task=mnli", "model.revision=abc"]
        )
    GlobalHydra.instance().clear()
    model = build(cfg.model)
    refused(
        r"^model\.hub\.mnli=textattack/bert-base-uncased-MNLI could not be read from the hub \(no network\): "
        r"give model\.checkpoint=DIR",
        lambda: model.build(blank(PAIRS, MNLI, "mnli"), Path("unused")),
    )
    options = {"trust_remote_code": False, "local_files_only": False, "revision": "abc"}
    assert asked == [("textattack/bert-base-uncased-MNLI", options)]
    _, order, key = model._origin("mnli")
    assert label_order(["LABEL_0", "LABEL_1", "LABEL_2"], MNLI, order, key)[0] == [1, 2, 0]
    assert set(cfg.model.hub) == set(TASKS) and model._origin("rte")[1] is None
    cfg.model.revision = None
    pinned, _, _ = build(cfg.model)._origin("sst2")
    assert (pinned.place, pinned.key) == ("textattack/bert-base-uncased-SST-2", f"model.hub.sst2={pinned.place}")
    assert COMMIT.fullmatch(pinned.revision) and build(cfg.model)._origin("rte")[0].revision is None


def test_an_unreachable_hub_is_one_line_and_fast(tmp_path):
    """A process of its own, because the libraries read the environment once."""
    code = (
        "from pathlib import Path\n"
        "from bayesq.suite.datasets.base import DataSplits\n"
        "from bayesq.suite.models.transformers_model import TransformersClassifier\n"
        "from bayesq.suite.errors import UserError\n"
        "import time, transformers.models.auto\n"
        "data = DataSplits(None, None, None, 2, 'accuracy', {})\n"
        "start = time.perf_counter()\n"
        "try:\n"
        "    TransformersClassifier(32, source='some/model').build(data, Path('x'))\n"
        "except UserError as error:\n"
        "    print(time.perf_counter() - start)\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | more, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        seconds, *message = done.stdout.splitlines()
        assert len(message) == 1 and message[0].startswith("model.name=some/model could not be read from the hub (")
        assert message[0].endswith("give model.checkpoint=DIR with config.json, model.safetensors, tokenizer")
        assert float(seconds) < 20


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """GLUE files of every task, and a random classifier for each."""
    place = tmp_path_factory.mktemp("glue")
    for task, known in TASKS.items():
        write_tsv(place / "data", task)
        tiny_bert(place / "models" / task, len(known.classes) or 1, known.classes)
    return place


def overrides(place: Path, *more: str) -> list[str]:
    return [
        "model=transformers",
        "dataset=glue",
        f"dataset.root={place / 'data'}",
        f"model.checkpoint={place / 'models'}/${{dataset.task}}",
        "model.max_length=32",
        "dataset.calibration_pool=20",
        "calibration.examples=16",
        "bits=3",
        f"results_dir={place / 'results'}",
        f"cache_dir={place / 'cache'}",
        "wandb.mode=disabled",
        *more,
    ]


def run_here(place: Path, *more: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=overrides(place, *more))
    GlobalHydra.instance().clear()
    schema.validate(cfg)
    runner.run(cfg)
    return json.loads((config.run_dir(cfg) / "result.json").read_text())


def table(place: Path, result: dict, name: str) -> list[dict[str, str]]:
    with (place / "results" / result["run_id"] / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_quantized_and_measured(workplace, task):
    result = run_here(workplace, f"dataset.task={task}", "method=rtn")
    metrics = [key.split("/")[1] for key in result if key.startswith("delta/") and key.count("/") == 1]
    assert result["primary_metric"] == metrics[0] and result["q/kl_to_fp"] > 0
    for metric in metrics:
        low, high = result[f"delta/{metric}/ci95"]
        assert low <= high and result[f"q/{metric}"] - result[f"fp/{metric}"] == result[f"delta/{metric}"]
    assert (result["q/agreement"] is None) == (task == "stsb")


def test_a_regression_with_every_stage(workplace):
    stages = ("method=bayesq", "distill=true", "proxy=mc", "monte_carlo.examples=16", "monte_carlo.samples=2")
    result = run_here(workplace, "dataset.task=stsb", *stages)
    rows = table(workplace, result, "predictions.csv")
    assert list(rows[0]) == [
        *("label", "fp_prediction", "q_prediction", "fp_squared_error", "q_squared_error", "kl", "id")
    ]
    differences = [(float(row["fp_prediction"]) - float(row["q_prediction"])) ** 2 / 2 for row in rows]
    assert [float(row["kl"]) for row in rows] == pytest.approx(differences)
    assert result["q/kl_to_fp"] == pytest.approx(sum(differences) / len(differences)) and result["q/kl_to_fp"] > 0
    assert result["q/ece"] is None and result["fp/ece"] is None and result["q/agreement"] is None
    assert result["distill/heldout_kl_after"] <= result["distill/heldout_kl_before"]
    kappas = [float(row["kappa"]) for row in table(workplace, result, "layers.csv")]
    assert len({*kappas} - {1.0}) > 1 and result["fallback/kappa_undefined"] == 0
    assert [row["label"] for row in rows][:3] == ["0.0", "0.5", "1.0"]


def test_the_likelihood_is_the_data_sets(workplace):
    more = ("method=bayesq", "dataset.task=stsb")
    auto, gaussian = (run_here(workplace, *more, f"posterior.likelihood={name}") for name in ("auto", "gaussian"))
    assert auto["q/kl_to_fp"] == gaussian["q/kl_to_fp"] > 0
    refused(
        "posterior.likelihood=categorical: .*leave it at auto",
        lambda: run_here(workplace, *more, "posterior.likelihood=categorical"),
    )
    more = ("method=bayesq", "dataset.task=rte")
    auto, categorical = (run_here(workplace, *more, f"posterior.likelihood={name}") for name in ("auto", "categorical"))
    assert auto["q/kl_to_fp"] == categorical["q/kl_to_fp"] > 0


@pytest.mark.parametrize("method", ["rtn", "gptq", "bayesq distill=true correction=moments"])
def test_embeddings_are_rounded_row_by_row_and_counted(workplace, method):
    switches = ("dataset.task=sst2", f"method={method.split()[0]}", *method.split()[1:], "bits=3.5")
    plain, result = (
        run_here(workplace, *switches, f"layers.include_embeddings={flag}", "layers.exclude=[*token_type*]")
        for flag in ("false", "true")
    )
    tables = {"word_embeddings": (64, 16), "position_embeddings": (64, 16)}
    rows = {row["name"].rpartition(".")[2]: row for row in table(workplace, result, "layers.csv")}
    assert {name for name, row in rows.items() if row["kind"] == "Embedding"} == {*tables}
    assert result["bytes/fp32"] - plain["bytes/fp32"] == 4 * sum(r * c for r, c in tables.values())
    assert result["bits/code"] <= 3.5 and sum(float(rows[name]["bits/code"]) for name in tables) / 2 == 3.5
    buffers, header = read_tensors(workplace / "results" / result["run_id"] / "quantized.safetensors")
    stored = unpack_model(buffers, header)
    (name,) = (name for name in stored if name.endswith("word_embeddings"))
    weight = load_file(workplace / "models" / "sst2" / "model.safetensors")[f"{name.removeprefix('model.')}.weight"]
    tensor, weight = stored[name], weight.double()
    scale, zero = mse_grid(weight, tensor.width)
    assert torch.equal(tensor.codes, round_affine(weight, scale, zero, tensor.width)[0].to(torch.uint8))
    assert result["q/kl_to_fp"] != plain["q/kl_to_fp"]


def test_a_network_without_embeddings_cannot_include_them(workplace):
    excluded = ("layers.include_embeddings=true", "layers.exclude=[*_embeddings]")
    refused(
        "layers.include_embeddings=true: model=.* has no embedding left to quantize",
        lambda: run_here(workplace, "dataset.task=sst2", "method=rtn", *excluded),
    )


@pytest.mark.slow
def test_a_sweep_over_tasks_through_the_command_line(workplace, tmp_path):
    shutil.copytree(workplace, tmp_path / "place")
    place = tmp_path / "place"
    command = overrides(place, "dataset.task=sst2,stsb,mnli", "method=bayesq", "distill=true", "proxy=mc")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "-m", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 300
    for task, unit in (("sst2", "% accuracy"), ("stsb", "x100 pearson"), ("mnli", "% accuracy")):
        assert re.search(rf"transformers on glue {task}: full precision -?[\d.]+ {unit} on", done.stdout), done.stdout
    scores = subprocess.run(
        [sys.executable, "-m", "analysis", str(place / "results"), "--glue"], cwd=ROOT, capture_output=True, text=True
    )
    assert scores.returncode == 0, scores.stderr
    assert "cola, mrpc, qqp, qnli, rte, wnli" in scores.stdout, scores.stdout


# ------------------------------------------------------------------------------------------------------- experiments


@pytest.mark.parametrize(
    ("arguments", "model", "tasks"),
    [
        (["experiment=bert_glue", "dataset.task=rte"], "bert_base", None),
        (["experiment=glue", "model=bert_base"], "bert_base", list(TASKS)),
        (["experiment=glue"], "minilm", list(TASKS)),
    ],
)
def test_experiments_compose(arguments, model, tasks):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=arguments, return_hydra_config=True)
    GlobalHydra.instance().clear()
    assert cfg.model.name == model and cfg.dataset.name == "glue"
    if tasks is not None:
        assert sorted(cfg.hydra.sweeper.params["dataset.task"].split(",")) == sorted(tasks)
        assert cfg.hydra.mode.name == "MULTIRUN"

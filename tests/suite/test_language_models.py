"""Causal language models from folders: windows, heads, perplexity, errors of one line, and whole runs."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from hydra import compose, initialize_config_dir
from tiny_lm import LETTERS, SPECIAL, VOCABULARY, letters, prose, tiny_lm

from bayesq.batches import TensorExamples
from bayesq.evaluation import compare, paired_rows
from bayesq.quant.layers import quantizable_layers
from bayesq.suite import runner, schema
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.datasets.text import TextFile, WikiText
from bayesq.suite.errors import UserError
from bayesq.suite.export import export
from bayesq.suite.loading import load_quantized
from bayesq.suite.models.causal_lm import CausalLM
from bayesq.suite.models.windows import Windows

ROOT = Path(__file__).parents[2]
WINDOW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(prose(2000), encoding="utf-8")
    return path


def loaded(path: Path, **keys: object) -> DataSplits:
    return TextFile(path=str(path), **{"window": WINDOW, **keys}).load(path.parent)  # type: ignore[arg-type]


def encoded(examples: Examples, **changed: object) -> list[list[int]]:
    windows = Windows(letters(), "model=tiny", 32, VOCABULARY)
    for key, value in changed.items():
        setattr(windows, key, value)
    return windows(examples).inputs["input_ids"].tolist()


def decoded(rows: list[list[int]]) -> str:
    return "".join(LETTERS[k - len(SPECIAL)] for row in rows for k in row)


class TestWindows:
    def test_evaluation_windows_are_the_text_cut_in_equal_parts(self, text: Path) -> None:
        data = loaded(text)
        rows, end = encoded(data.evaluation), data.evaluation.inputs[0].text  # type: ignore[union-attr]
        assert decoded(rows) == end[: len(end) // WINDOW * WINDOW]
        assert {len(row) for row in rows} == {WINDOW}
        assert encoded(loaded(text, limit=5).evaluation) == rows[:5]

    def test_the_two_parts_of_a_file_do_not_overlap(self, text: Path) -> None:
        data = loaded(text)
        parts = [split.inputs[0].text for split in (data.calibration_pool, data.evaluation)]  # type: ignore[union-attr]
        assert "".join(parts) == text.read_text(encoding="utf-8")
        assert parts[0].endswith("\n")

    def test_calibration_windows_are_drawn_without_replacement_and_nested(self, text: Path) -> None:
        data = loaded(text)
        beginning = data.calibration_pool.inputs[0].text  # type: ignore[union-attr]
        possible = [beginning[k : k + WINDOW] for k in range(0, len(beginning) - WINDOW + 1, WINDOW)]
        few, many, other = (encoded(data.calibration(n, seed)) for n, seed in ((4, 0), (len(possible), 0), (4, 1)))
        assert few == many[:4] != other
        assert sorted(decoded([row]) for row in many) == sorted(possible)

    def test_a_bos_token_begins_every_window(self, text: Path) -> None:
        plain, begun = encoded(loaded(text).evaluation), encoded(loaded(text, bos=True).evaluation)
        assert {row[0] for row in begun} == {SPECIAL.index("<s>")}
        assert {len(row) for row in begun} == {WINDOW}
        assert decoded([row[1:] for row in begun]).startswith(decoded(plain[:10]))

    def test_the_text_stays_as_it_is(self, tmp_path: Path) -> None:
        for name, content in (("wiki.test.raw", " \n = a = \r\n"), ("wiki.valid.raw", "b\n")):
            (tmp_path / name).write_bytes(content.encode())
        data = WikiText(root=str(tmp_path), window=2).load(tmp_path)
        assert data.evaluation.inputs[0].text == " \n = a = \r\n"  # type: ignore[union-attr]
        assert data.calibration_pool.ids == ["wiki.valid.raw"]


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "keys", "message"),
        [
            ("", {}, r"dataset\.path=.*: prose\.txt is empty"),
            (" \n", {}, "is empty"),
            ("abc", {}, r"no line end to divide it at: add calibration\.source=FILE"),
            ("ab\n" * 6, {}, r"has 6 tokens, fewer than a window: lower dataset\.window=16, or give a longer text"),
            (prose(2000), {"window": 33}, r"dataset\.window=33 is not possible: model=tiny takes at most 32 tokens"),
            (prose(2000), {"window": 1}, r"dataset\.window=1 is not possible"),
            (prose(2000), {"limit": 99}, r"dataset\.limit=99 is not possible: .* has 61 windows of 16 tokens"),
            (prose(2000), {"calibration_share": 1.0}, r"dataset\.calibration_share=1\.0 is not possible"),
            (prose(2000), {"calibration_source": "prose.txt"}, "calibrate on another one"),
            (
                prose(2000),
                {"calibration_source": "none.txt"},
                r"calibration\.source=none\.txt: none\.txt cannot be read",
            ),
        ],
    )
    def test_texts(
        self, content: str, keys: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "prose.txt"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message) as caught:
            encoded(loaded(path, **keys).evaluation)
        assert "\n" not in str(caught.value)

    def test_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "photo"
        path.write_bytes(b"ab\xff")
        with pytest.raises(UserError, match=r"not UTF-8 text .* at byte 2"):
            loaded(path)

    def test_more_calibration_windows_than_there_are(self, text: Path) -> None:
        with pytest.raises(UserError, match=r"calibration\.examples=999 is not possible: .* choose 1 to"):
            encoded(loaded(text).calibration(999, 0))

    def test_no_bos_token(self, text: Path) -> None:
        with pytest.raises(UserError, match=r"dataset\.bos=true: the tokenizer of model=tiny has no bos token"):
            encoded(loaded(text, bos=True).evaluation, tokenizer=letters(bos=False))

    def test_a_tokenizer_of_another_model(self, text: Path) -> None:
        with pytest.raises(UserError, match=r"returns token 31, but its embedding table has 20 rows"):
            encoded(loaded(text).evaluation, vocabulary=20)

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({}, r"model=causal_lm needs model\.name=ID_ON_THE_HUB or model\.checkpoint"),
            ({"checkpoint": "/none"}, r"model\.checkpoint=/none: there is no such folder"),
            ({"checkpoint": "/none.gguf"}, r"model\.checkpoint=/none\.gguf: there is no such file"),
        ],
    )
    def test_missing_models(self, keys: dict[str, str], message: str, text: Path) -> None:
        with pytest.raises(UserError, match=message):
            CausalLM(**keys).build(loaded(text), text.parent)

    def test_a_gated_repository(self, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        error = GatedRepoError.__new__(GatedRepoError)  # the real one wants a response
        Exception.__init__(error, "403 Client Error")
        monkeypatch.setattr("bayesq.suite.models.transformers_model.reachable", lambda: True)
        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", Mock(side_effect=error))
        with pytest.raises(
            UserError, match=r"^model\.name=meta/llama could not .* \(it is gated: accept its terms"
        ) as caught:
            CausalLM(source="meta/llama").build(loaded(text), text.parent)
        assert "\n" not in str(caught.value)

    def test_no_tokenizer(self, folder: Path, text: Path, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        with pytest.raises(UserError, match="tokenizer"):
            CausalLM(checkpoint=str(tmp_path)).build(loaded(text), tmp_path)


class TestHead:
    def test_a_head_of_its_own_stays_unless_asked_for(self, folder: Path, text: Path) -> None:
        network = CausalLM(checkpoint=str(folder)).build(loaded(text), text.parent)
        assert (network.left_out, network.description["head"]) == (("model.lm_head",), "full precision")
        both = CausalLM(checkpoint=str(folder), quantize_head=True).build(loaded(text), text.parent)
        assert (both.left_out, both.description["head"]) == ((), "quantized")

    def test_a_tied_head_is_never_quantized(self, text: Path, tmp_path: Path) -> None:
        tied = tiny_lm(tmp_path / "tied", tie_word_embeddings=True)
        network = CausalLM(checkpoint=str(tied)).build(loaded(text), tmp_path)
        assert "tied" in str(network.description["head"])
        assert not any("lm_head" in name for name in quantizable_layers(network.module))
        with pytest.raises(UserError, match=r"model\.quantize_head=true"):
            CausalLM(checkpoint=str(tied), quantize_head=True).build(loaded(text), tmp_path)

    def test_blocks_are_the_decoder_layers(self, folder: Path, text: Path) -> None:
        network = CausalLM(checkpoint=str(folder)).build(loaded(text), text.parent)
        assert {"model.model.layers.0", "model.model.layers.1"} <= set(network.blocks)


def naive_perplexity(module: torch.nn.Module, windows: torch.Tensor) -> float:
    """e^(mean NLL) in float64, token by token."""
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            logits = module(window[None])[0].double()
        for here, following in zip(logits[:-1], window[1:], strict=True):
            total += float(torch.logsumexp(here, 0) - here[following])
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_that_of_a_naive_loop(folder: Path, text: Path, batch_size: int) -> None:
    data = loaded(text, limit=7)
    network = CausalLM(checkpoint=str(folder)).build(data, text.parent)
    examples = network.encode(data.evaluation)
    assert isinstance(examples, TensorExamples)
    rows, _ = paired_rows(
        network.module, network.module, examples, data.likelihood, batch_size, torch.device("cpu"), "test"
    )
    result = compare(rows, 0, data.metrics)
    assert result["fp/perplexity"] == pytest.approx(naive_perplexity(network.module, examples.inputs["input_ids"]))
    assert result["q/kl_to_fp"] == 0


@pytest.fixture
def settings() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def run(folder: Path, text: Path, out: Path, *more: str) -> dict[str, object]:
    overrides = [
        *("model=causal_lm", f"model.checkpoint={folder}", "dataset=text", f"dataset.path={text}", "bits=3"),
        *(f"dataset.window={WINDOW}", "dataset.limit=6", "calibration.examples=24", "wandb.mode=disabled"),
        *(f"results_dir={out}", f"cache_dir={out}/cache", "device=cpu", *more),
    ]
    cfg = compose("config", overrides)
    schema.validate(cfg)
    return runner.run(cfg)


@pytest.mark.parametrize(
    "more",
    [
        ["method=rtn"],
        ["method=bayesq", "inputs=paired", "correction=moments"],
        ["method=bayesq", "distill=true", "proxy=mc", "monte_carlo.examples=4"],
    ],
    ids=" ".join,
)
def test_a_run_and_the_network_from_its_file(
    folder: Path, text: Path, tmp_path: Path, settings: None, more: list[str]
) -> None:
    result = run(folder, text, tmp_path, *more)
    assert result["q/perplexity"] > 0 and result["q/kl_to_fp"] > 0
    assert result["quantized/share"] == pytest.approx(
        result["bytes/fp32"] / 4 / result["source"]["model"]["parameters"]
    )
    assert set(result["quantized/left_out"]) == {"model.model.embed_tokens.weight", "model.lm_head.weight"}
    place = tmp_path / str(result["run_id"])
    with (place / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"prose.txt, end:{k}" for k in range(6)]
    assert {row["predictions"] for row in rows} == {str(float(WINDOW - 1))}
    network = load_quantized(place / "quantized.safetensors", cache_dir=str(tmp_path / "cache"))
    data = loaded(text, limit=6)
    windows = torch.tensor(encoded(data.evaluation))
    assert naive_perplexity(network, windows) == pytest.approx(result["q/perplexity"], rel=1e-5)
    assert json.loads((place / "result.json").read_text(encoding="utf-8"))["q/perplexity"] == result["q/perplexity"]


def test_other_programs_read_the_exported_network(folder: Path, text: Path, tmp_path: Path, settings: None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tied = tiny_lm(tmp_path / "tied", tie_word_embeddings=True)
    result = run(tied, text, tmp_path, "method=rtn")
    place = tmp_path / str(result["run_id"])
    network = load_quantized(place / "quantized.safetensors", cache_dir=str(tmp_path / "cache"))
    tokens = torch.tensor(encoded(loaded(text, limit=2).evaluation))
    output, _ = export(place, "dequantized", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, network(tokens))
    assert AutoTokenizer.from_pretrained(output).encode("abc") == letters().encode("abc")
    file, _ = export(place, "packed")
    with torch.no_grad():
        assert torch.equal(load_quantized(file)(tokens), network(tokens))


def test_calibration_source_changes_the_run(folder: Path, text: Path, tmp_path: Path, settings: None) -> None:
    other = tmp_path / "other.txt"
    other.write_text(prose(1000, seed=1), encoding="utf-8")
    results = [run(folder, text, tmp_path, "method=gptq", *more) for more in ([], [f"calibration.source={other}"])]
    assert results[0]["run_id"] != results[1]["run_id"]
    assert results[1]["source"]["dataset"]["calibration"] == "other.txt"
    with pytest.raises(UserError, match=r"calibration\.examples=999 is not possible: calibration\.source="):
        run(folder, text, tmp_path, "method=gptq", f"calibration.source={other}", "calibration.examples=999")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("evaluation.autocast=bfloat16", r"evaluation\.autocast=bfloat16: language models are evaluated in float32"),
        (
            "posterior.likelihood=categorical",
            r"posterior\.likelihood=categorical: is not the likelihood of next tokens",
        ),
    ],
)
def test_what_language_models_do_not_have(
    folder: Path, text: Path, tmp_path: Path, settings: None, more: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, text, tmp_path, "method=bayesq", more)

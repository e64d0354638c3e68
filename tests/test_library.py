"""`bayesq.quantize` on users' own networks: no configuration, no files, no tracking."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import timm
import torch
import transformers
from omegaconf import OmegaConf
from torch import Tensor, nn

import bayesq
from baselines.rtn import RTN
from bayesq import repair
from bayesq.calibration.inputs import InputMoment
from bayesq.defaults import conf_dir
from bayesq.errors import Refused
from bayesq.quant.file import read_packed
from bayesq.quant.network import fill
from bayesq.tensor_file import CorruptFile


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("resnet10t", num_classes=5, channels=(16, 24, 32, 48)).eval()


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=3, **sizes)
        return transformers.BertForSequenceClassification(config).eval()


def sentences() -> list[dict[str, Tensor]]:
    """Two batches of different length, as a tokenizer gives them, with labels beside."""
    generator, batches = torch.Generator().manual_seed(1), []
    for length in (9, 6):
        ids = torch.randint(1, 50, (8, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(2, length + 1, (8, 1), generator=generator)).long()
        mask[0] = 1
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": torch.zeros(8).long()})
    return batches


@pytest.mark.parametrize("method", ["bayesq", "gptq", "awq", "rtn"])
def test_an_image_network(method):
    network, x = resnet(), images()
    before = copy.deepcopy(network.state_dict())
    quantized, report = bayesq.quantize(network, [x[:16], (x[16:], torch.zeros(8))], bits=3, method=method)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not network._forward_hooks and not quantized._forward_hooks
    assert (
        report.code_bits <= 3 < report.stored_bits and report.stored_bytes == report.stored_bits * weights(report) / 8
    )
    risks = [row["achieved_risk"] for row in report.layers]
    assert all(risk > 0 for risk in risks) if method == "bayesq" else risks == [None] * len(risks)
    for row in report.layers:
        weight, after = (of.get_submodule(row["name"]).weight.detach().double() for of in (network, quantized))
        assert row["relative_error"] == pytest.approx(float((after - weight).norm() / weight.norm()), rel=1e-3)
    with torch.no_grad():
        error = float((quantized(x) - network(x)).square().mean() / network(x).square().mean())
    assert 0 < error < 0.5
    assert f"{report.stored_bytes:,} bytes" in str(report) and "conv1.0" in str(report)


def test_the_report_names_what_stays_in_full_precision():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 4, bias=False)).eval()
    _, report = bayesq.quantize(network, [torch.randn(8, 3, 4)], method="rtn", exclude=["1"])
    assert report.coverage.share == 24 / (78 + 24) and report.coverage.left_out == {"1.weight": 72}
    last = "24 % of the parameters are quantized; largest of the rest: 1.weight (72)"
    assert str(report).splitlines()[-1] == last


@pytest.mark.parametrize("method", ["bayesq", "gptq", "gptaq", "qronos", "rtn"])
def test_entropy_coded_networks_survive_the_file(method, tmp_path):
    def small() -> nn.Module:
        torch.manual_seed(0)
        convolutions = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()

    x = torch.randn(24, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    quantized, report = bayesq.quantize(small(), [x], bits=2.5, method=method, codec="entropy")
    assert 2 < report.code_bits <= 2.5
    report.save(tmp_path / "network.safetensors")
    again = read_packed(tmp_path / "network.safetensors")
    network = small()
    fill(network, again.tensors, again.parameters)
    with torch.no_grad():
        assert torch.equal(network(x), quantized(x))


def weights(report: bayesq.Report) -> float:
    return sum(tensor.codes.numel() for tensor in report.packed.tensors.values())


def test_a_network_of_transformers_with_padded_batches():
    network = bert()
    quantized, report = bayesq.quantize(network, sentences(), bits=4, correction="moments")
    assert type(quantized) is type(network) and "bert.encoder.layer.1.output.dense" in {
        r["name"] for r in report.layers
    }
    batch = {name: x for name, x in sentences()[0].items() if name != "labels"}
    with torch.no_grad():
        before, after = network(**batch).logits, quantized(**batch).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(before, after, rtol=0.2, atol=0.05)


def test_padding_and_the_cut_into_batches_change_nothing():
    """The same sentences in one padded batch, and padded beyond the longest."""
    first, second = sentences()
    longer = {name: nn.functional.pad(x, (0, 9 - x.shape[1])) for name, x in second.items() if name != "labels"}
    whole = {name: torch.cat([first[name], longer[name]]) for name in longer}
    one, _ = bayesq.quantize(bert(), sentences(), bits=3)
    other, _ = bayesq.quantize(bert(), [whole], bits=3)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in one.state_dict().items())


def test_what_is_saved_is_what_is_returned(tmp_path: Path):
    network = resnet()
    quantized, report = bayesq.quantize(network, [images()], bits=2.5, distill=True)
    report.save(tmp_path / "network.safetensors")
    packed, loaded = read_packed(tmp_path / "network.safetensors"), resnet()
    fill(loaded, packed.tensors, packed.parameters)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in quantized.state_dict().items())


def test_a_saved_file_is_read_under_a_str_and_load_quantized_says_how(tmp_path: Path):
    file = str(tmp_path / "network.safetensors")
    _, report = bayesq.quantize(resnet(), [images()], bits=3, method="rtn")
    report.save(file)
    assert read_packed(file).tensors.keys() == report.packed.tensors.keys()
    with pytest.raises(CorruptFile, match=r"report.save: `packed = bayesq.quant.file.read_packed\(path\)`"):
        bayesq.load_quantized(file)


def test_a_method_of_the_callers_own():
    """Half of the rows of each layer at 3 bits, half at 5, in place of what the allocator says."""

    class Halves(RTN):
        def prepare(self, layers, allocate, context):
            rows = {name: torch.arange(len(width)) for name, width in allocate(layers).items()}
            return {name: (3 + 2 * (row % 2)).to(torch.uint8) for name, row in rows.items()}

    _, report = bayesq.quantize(resnet(), [images()], bits=4, method=Halves("mse"))
    _, named = bayesq.quantize(resnet(), [images()], bits=3, method="rtn", clip="mse")
    for name, tensor in report.packed.tensors.items():
        assert tensor.width.tolist() == [3 + 2 * (row % 2) for row in range(len(tensor.width))]
        assert torch.equal(tensor.codes[::2], named.packed.tensors[name].codes[::2])


def test_the_codes_are_those_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The suite's runner calls the same pipeline: with the same network and examples the codes are the same bits."""
    from hydra import compose, initialize_config_dir

    from bayesq.suite import plan, runner

    places = [f"results_dir={tmp_path / 'results'}", f"cache_dir={tmp_path / 'cache'}", "wandb.mode=disabled"]
    data = ["model=resnet", "dataset=digits", "dataset.limit=20", "calibration.examples=32", "bits=3"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=[*places, *data])
    result = runner.run(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))
    work = plan.load_workload(cfg, tmp_path / "cache")
    (batch,) = work.subject.examples.batches(32, "cpu")
    _, report = bayesq.quantize(work.subject.module, [batch.inputs], bits=3)
    stored = read_packed(tmp_path / "results" / result["run_id"] / "quantized.safetensors")
    assert all(torch.equal(stored.tensors[name].codes, x.codes) for name, x in report.packed.tensors.items())
    assert report.stored_bytes == result["bytes/packed"]


class Returning(nn.Module):
    """A small network that returns what `form` makes of its outputs."""

    def __init__(self, form=lambda y: y) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(32, 4), form
        self.eval()

    def forward(self, x: Tensor, weight: Tensor | None = None) -> object:
        y = self.layer(x[:, 0, 0] if x.ndim == 4 else x)
        return self.form(y if weight is None else y * weight.mean(1, keepdim=True))


def pair(length: int) -> dict[str, Tensor]:
    return {"x": images(4)[:, 0, 0], "weight": torch.ones(4, length)}


def test_a_dictionary_with_logits_is_an_output():
    quantized, report = bayesq.quantize(Returning(lambda y: {"loss": 0, "logits": y}), [images()], method="rtn")
    assert set(quantized(images())) == {"loss", "logits"} and report.code_bits == 4


def test_the_report_keeps_neither_network_nor_statistics_and_counts_every_fallback():
    network = resnet()
    network.unused = nn.Linear(3, 3).eval()
    _, report = bayesq.quantize(network, [images()], method="rtn", bits=4)
    assert vars(report).keys() == {
        "target_bits",
        "code_bits",
        "stored_bits",
        "stored_bytes",
        "layers",
        "fallbacks",
        "coverage",
        "packed",
    }
    assert report.fallbacks["unseen_layers"] == 1 and report.fallbacks["oom_retries"] == 0
    alive = weakref.ref(network)
    del network
    gc.collect()
    assert alive() is None


def test_distillation_takes_the_batches_that_the_caller_asked_for(monkeypatch: pytest.MonkeyPatch):
    sizes = []
    given = repair.posterior_predictive

    def teacher(full, layers, draw, batches, *rest):
        sizes.extend(len(batch) for batch in batches)
        return given(full, layers, draw, batches, *rest)

    monkeypatch.setattr(repair, "posterior_predictive", teacher)
    bayesq.quantize(Returning(), [images()], distill=True, batch_size=6)
    assert max(sizes) == 6


def test_a_defect_keeps_its_traceback_and_is_no_refusal(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(RTN, "prepare", broken)
    with pytest.raises(ValueError, match="not enough values") as raised:
        bayesq.quantize(resnet(), [images()], method="rtn")
    assert not isinstance(raised.value, Refused)


def large_weights() -> nn.Module:
    module = resnet()
    with torch.no_grad():
        module.conv1[0].weight.mul_(1e6)
    return module


class Namesake(InputMoment):
    """A statistic that has the name of another class."""


class WithNamesake(RTN):
    statistics = frozenset({Namesake()})


MISTAKES = {
    "training": (lambda: bayesq.quantize(resnet().train(), [images()]), r"^module: is in training mode"),
    "bits": (lambda: bayesq.quantize(resnet(), [images()], bits=9), r"^bits=9: needs a number from 2 to 8"),
    "text for bits": (
        lambda: bayesq.quantize(resnet(), [images()], bits="3"),
        r"^bits='3': needs a number from 2 to 8",
    ),
    "no module": (lambda: bayesq.quantize("resnet18", [images()]), r"^module='resnet18': needs a torch.nn.Module"),
    "no list": (lambda: bayesq.quantize(resnet(), None), r"^batches=None: needs a list of batches"),
    "seed": (lambda: bayesq.quantize(resnet(), [images()], seed="a"), r"^seed='a': needs a whole number"),
    "type of a switch": (
        lambda: bayesq.quantize(resnet(), [images()], refits="two"),
        r"^refits='two': needs a whole number",
    ),
    "fraction": (lambda: bayesq.quantize(resnet(), [images()], states=8.5), r"^states=8.5: needs a whole number"),
    "no method": (lambda: bayesq.quantize(resnet(), [images()], method=3), r"^method=3: .* has no statistics"),
    "class": (lambda: bayesq.quantize(resnet(), [images()], method=RTN), r"^method=<class .*: make an instance"),
    "switch of an object": (
        lambda: bayesq.quantize(resnet(), [images()], method=RTN("mse"), clip="minmax"),
        r"^clip: only a method given by name takes switches",
    ),
    "bits with entropy coding": (
        lambda: bayesq.quantize(resnet(), [images()], bits=0.5, codec="entropy"),
        r"^bits=0.5: needs a number from 1 to 8",
    ),
    "codec": (lambda: bayesq.quantize(resnet(), [images()], codec="huffman"), r"^codec=huffman: choose one of"),
    "codec of hqq": (
        lambda: bayesq.quantize(resnet(), [images()], method="hqq", codec="entropy"),
        r"^codec=entropy: this method has no entropy-coded form",
    ),
    "method": (
        lambda: bayesq.quantize(resnet(), [images()], method="gtpq"),
        r"^method=gtpq: choose .* did you mean 'gptq'",
    ),
    "switch": (lambda: bayesq.quantize(resnet(), [images()], refit=2), r"^refit: .* did you mean 'refits'"),
    "value": (lambda: bayesq.quantize(resnet(), [images()], refits=-1), r"refits=-1: needs a whole number"),
    "posterior": (lambda: bayesq.quantize(resnet(), [images()], posterior="full"), r"^posterior=full: choose one of"),
    "correction": (lambda: bayesq.quantize(resnet(), [images()], correction="all"), r"^correction=all: choose one of"),
    "likelihood": (lambda: bayesq.quantize(resnet(), [images()], likelihood="x"), r"^likelihood=x: choose one of"),
    "one batch": (lambda: bayesq.quantize(resnet(), images()), r"^batches: is a single batch; put it in a list"),
    "batch size": (lambda: bayesq.quantize(resnet(), [images()], batch_size=0), r"^batch_size=0: needs a whole"),
    "pattern": (lambda: bayesq.quantize(resnet(), [images()], exclude="fc"), r"^exclude='fc': needs a list"),
    "no batches": (lambda: bayesq.quantize(resnet(), []), r"^batches: there is none"),
    "text": (lambda: bayesq.quantize(resnet(), ["a text"]), r"^batches: a str is no batch"),
    "shapes": (
        lambda: bayesq.quantize(resnet(), [images(), images()[:, :, :16]]),
        r"^batches: x: shapes .* differ; sequences need an attention_mask",
    ),
    "inputs": (
        lambda: bayesq.quantize(bert(), [sentences()[0], {"input_ids": torch.ones(2, 4).long()}]),
        r"^batches: all batches need the same inputs",
    ),
    "pattern without a layer": (
        lambda: bayesq.quantize(resnet(), [images()], exclude=["head*"]),
        r"^exclude: pattern 'head\*' matches no",
    ),
    "all excluded": (lambda: bayesq.quantize(resnet(), [images()], exclude=["*"]), r"^exclude leaves no"),
    "switch value": (lambda: bayesq.quantize(resnet(), [images()], method="gptq", damping=-1), r"^damping=-1: must be"),
    "dict output": (
        lambda: bayesq.quantize(Returning(lambda y: {"scores": y}), [images()]),
        r"^module: its output is a dict, not a tensor or something with `logits`",
    ),
    "tuple output": (
        lambda: bayesq.quantize(Returning(lambda y: (y, y)), [images()]),
        r"^module: its output is a tuple, not a tensor",
    ),
    "second input of another shape": (
        lambda: bayesq.quantize(Returning(), [pair(8), pair(6)]),
        r"^batches: weight: shapes \[\(6,\), \(8,\)\] differ",
    ),
    "inputs of different length": (
        lambda: bayesq.quantize(Returning(), [pair(8) | {"weight": torch.ones(3, 8)}]),
        r"^batches: weight has shape \[3, 8\]; it must begin with examples, \[4\] as in x",
    ),
    "input without tokens": (
        lambda: bayesq.quantize(bert(), [sentences()[0] | {"position_ids": torch.arange(9)}]),
        r"^batches: position_ids has shape \[9\]; it must begin with examples and tokens, \[8, 9\]",
    ),
    "allocator": (
        lambda: bayesq.quantize(resnet(), [images()], allocator="greedy"),
        r"^allocator=greedy: choose one of",
    ),
    "rotate": (lambda: bayesq.quantize(resnet(), [images()], rotate="false"), r"^rotate='false': needs True or False"),
    "distill": (lambda: bayesq.quantize(resnet(), [images()], distill=None), r"^distill=None: needs True or False"),
    "a statistic called as another": (
        lambda: bayesq.quantize(resnet(), [images()], method=WithNamesake("mse"), inputs="paired"),
        r"^two statistics are called input_moment: .*Namesake",
    ),
    "inference mode": (
        lambda: torch.inference_mode()(bayesq.quantize)(resnet(), [images()]),
        r"^quantize: cannot run in torch\.inference_mode",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_value_error_that_names_the_argument(name):
    call, line = MISTAKES[name]
    with pytest.raises(Refused, match=line):
        call()


def test_weights_near_the_end_of_float16():
    quantized, _ = bayesq.quantize(large_weights(), [images()], bits=4)
    assert bool(torch.isfinite(quantized(images())).all())


class TestEvaluate:
    def test_accuracy_and_kl_are_those_of_both_outputs(self):
        generator = torch.Generator().manual_seed(0)
        full, other = nn.Linear(5, 3), nn.Linear(5, 3)
        x, labels = torch.randn(10, 5, generator=generator), torch.arange(10) % 3
        with torch.no_grad():
            p, q = full(x).double().softmax(1), other(x).double().softmax(1)
        result = bayesq.evaluate(full, other, [x[:6], x[6:]], labels, batch_size=4)
        assert result["fp/accuracy"] == pytest.approx(float((p.argmax(1) == labels).double().mean()))
        assert result["q/accuracy"] == pytest.approx(float((q.argmax(1) == labels).double().mean()))
        assert result["q/kl_to_fp"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": torch.zeros(3)}, r"labels: have shape \[3\]; there are 4 examples"),
            ({"metrics": ["top5"]}, "metrics=top5: choose one of accuracy, "),
            ({"likelihood": "poisson"}, "likelihood=poisson: choose one of "),
        ],
    )
    def test_bad_arguments_are_named(self, change, message):
        network = nn.Linear(2, 2)
        arguments = {"batches": [torch.zeros(4, 2)], "labels": torch.zeros(4).long(), **change}
        with pytest.raises(Refused, match=message):
            bayesq.evaluate(network, network, **arguments)

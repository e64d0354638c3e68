"""timm networks by name: published weights and the hub they come from, checkpoints, inputs, attention."""

import builtins
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.fisher import FISHER_DIAGONAL, GRADIENT_MOMENT
from bayesq.quant.layers import quantizable_layers
from bayesq.suite import hub
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import state_checksum
from bayesq.suite.models.checkpoint import load_weights, read_checkpoint
from bayesq.suite.models.timm_model import TimmModel

ROOT = Path(__file__).parents[2]
# timm's own networks for tests: fractions of a million parameters, input 160x160.
RESNET, VIT, CONVNEXT = "test_resnet.r160_in1k", "test_vit.r160_in1k", "test_convnext.r160_in1k"
COMMIT = "0123456789" * 4


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def blank(inputs: object, classes: int) -> DataSplits:
    """`inputs` as every split of a data set."""
    count = len(inputs)  # type: ignore[arg-type]
    whole = Examples(inputs, torch.zeros(count, dtype=torch.int64), [str(i) for i in range(count)])  # type: ignore[arg-type]
    return DataSplits(whole, whole, whole, classes, "accuracy", {})


def images(classes: int = 10, size: int = 32) -> DataSplits:
    return blank(torch.rand(6, 3, size, size, generator=torch.Generator().manual_seed(0)), classes)


def network(architecture: str, classes: int, seed: int = 1, **options: object) -> nn.Module:
    """A randomly initialised network with busy normalisation statistics."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: nn.Module = timm.create_model(architecture, num_classes=classes, **options).eval()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr, operator]
                nn.init.uniform_(norm.weight, 0.5, 1.5)  # timm's begin at zero where a block ends
    return module


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that nobody answers for."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return folder


def put(cache: Path, architecture: str, module: nn.Module) -> None:
    """What a download of the published weights would have left in the cache."""
    repository = cache / f"models--timm--{architecture}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    save_file(module.state_dict(), repository / "snapshots" / COMMIT / "model.safetensors")


# --------------------------------------------------------------------------------------------------------- checkpoints


class TestReadCheckpoint:
    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(4)}

    def write(self, path: Path, content: object) -> Path:
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)  # type: ignore[arg-type, func-returns-value]
        return path

    @pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.th", "w.bin", "W.PTH"])
    def test_formats(self, tmp_path: Path, name: str) -> None:
        found = read_checkpoint(self.write(tmp_path / name, self.weights))
        assert found.keys() == self.weights.keys()
        assert all(torch.equal(found[key], self.weights[key]) for key in found)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda w: {"state_dict": w, "epoch": 3},
            lambda w: {"model": w},
            lambda w: {"state_dict": {f"module.{name}": value for name, value in w.items()}},
            lambda w: {f"module.{name}": value for name, value in w.items()},
        ],
        ids=["state_dict", "model", "DataParallel", "prefix"],
    )
    def test_wrappers(self, tmp_path: Path, wrap: Callable[[object], object]) -> None:
        assert read_checkpoint(self.write(tmp_path / "w.pt", wrap(self.weights))).keys() == self.weights.keys()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("w.pt", None, r"cannot be read \(No such file"),
            ("w.safetensors", None, r"cannot be read \(No such file"),
            ("w.onnx", b"", r"needs a file that ends in one of \.safetensors, \.pt, \.pth, \.th, \.bin"),
            ("weights", b"", "needs a file that ends in"),
            ("w.safetensors", b"text", "not a checkpoint that holds tensors"),
            ("w.pt", b"text", "not a checkpoint that holds tensors"),
            ("w.pt", b"", "not a checkpoint that holds tensors"),
            ("w.pt", {}, "not a checkpoint that holds tensors"),
            ("w.pt", torch.zeros(3), "not a checkpoint that holds tensors"),
            ("w.pt", {"state_dict": {"a": torch.zeros(1), "epoch": 3}}, "not a checkpoint that holds tensors"),
            ("w.pt", {"a": builtins.print}, "not a checkpoint that holds tensors"),  # pickled code is not run
            ("w.pt", nn.Linear(2, 2), "not a checkpoint that holds tensors"),
        ],
    )
    def test_anything_else_is_refused(self, tmp_path: Path, name: str, content: object, message: str) -> None:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError, match=rf"^model\.checkpoint={re.escape(str(path))}: {message}") as caught:
            read_checkpoint(path)
        one_line(caught)

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "w.pt").mkdir()
        with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
            read_checkpoint(tmp_path / "w.pt")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("0.weight"), r'Missing key.*"0\.weight"'),
            (lambda w: w.update(extra=torch.zeros(1)), r'Unexpected key.*"extra"'),
            (lambda w: w.update({"1.bias": torch.zeros(9)}), r"size mismatch for 1\.bias: .*\[9\].*\[3\]"),
        ],
    )
    def test_the_first_difference_is_named(self, change: Callable[[dict], object], message: str) -> None:
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        weights = dict(module.state_dict())
        change(weights)
        with pytest.raises(UserError, match=rf"^model\.checkpoint=x: these are not the weights of y \(.*{message}"):
            load_weights(module, weights, Path("x"), "y")

    def test_a_checkpoint_older_than_the_batch_counter(self) -> None:
        module = nn.BatchNorm1d(3)
        weights = {name: value for name, value in module.state_dict().items() if "tracked" not in name}
        load_weights(module, weights, Path("x"), "y")


# ------------------------------------------------------------------------------------------------------------ networks


class TestCheckpoint:
    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        torch.save(network(RESNET, 10).state_dict(), tmp_path / "w.pt")
        return str(tmp_path / "w.pt")

    def test_weights_are_the_files_and_the_global_generator_is_left_alone(self, file: str, tmp_path: Path) -> None:
        before = torch.get_rng_state()
        built = TimmModel(RESNET, file).build(images(), tmp_path)
        assert torch.equal(torch.get_rng_state(), before)
        assert built.checksum == state_checksum(network(RESNET, 10)) and not built.module.training
        assert built.description["architecture"] == f"timm {RESNET}" and built.description["fp_source"] == file
        assert built.description["checkpoint_sha256"] == hashlib.sha256(Path(file).read_bytes()).hexdigest()
        json.dumps(built.description)
        (batch,) = built.encode(images().evaluation).batches(10, "cpu")
        assert built.module(**batch.inputs).shape == (6, 10)

    def test_without_a_tag_the_default_one_is_recorded(self, file: str, tmp_path: Path) -> None:
        assert TimmModel("test_resnet", file).build(images(), tmp_path).description["architecture"] == f"timm {RESNET}"

    def test_another_number_of_classes(self, file: str, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match=r"not the weights of model=test_resnet.* with 100 classes \(.*size mismatch for fc\.weight"
        ) as caught:
            TimmModel(RESNET, file).build(images(100), tmp_path)
        assert one_line(caught).startswith(f"model.checkpoint={file}: ")

    def test_another_network(self, file: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"not the weights of model=test_vit.* \(Missing key.*cls_token"):
            TimmModel(VIT, file).build(images(), tmp_path)

    def test_image_tensors_are_scaled_and_normalised(self, file: str, tmp_path: Path) -> None:
        data = images(size=8)
        built = TimmModel(RESNET, file, image_size=16).build(data, tmp_path)
        (batch,) = built.encode(data.evaluation).batches(10, "cpu")
        assert batch.inputs["x"].shape == (6, 3, 16, 16) and built.description["image_size"] == [16, 16]
        mean, std = (torch.tensor(built.description[key]).view(3, 1, 1) for key in ("mean", "std"))
        for k in range(6):  # Pillow's resizing as the judge, on the eight-bit image
            pixels = (data.evaluation.inputs[k] * 255).round().byte().permute(1, 2, 0).numpy()
            filter_ = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
            scaled = Image.fromarray(pixels).resize((16, 16), filter_[str(built.description["interpolation"])])
            expected = (torch.tensor(np.asarray(scaled)).permute(2, 0, 1) / 255 - mean) / std
            assert (batch.inputs["x"][k] - expected).abs().max() < 0.02 / std.min()

    def test_image_tensors_are_scaled_to_the_networks_own_size_by_default(self, file: str, tmp_path: Path) -> None:
        built = TimmModel(RESNET, file).build(images(), tmp_path)
        encoded = built.encode(images().evaluation)
        sizes = [batch.inputs["x"].shape for batch in encoded.batches(4, "cpu")]
        assert sizes == [(4, 3, 160, 160), (2, 3, 160, 160)]
        other = TimmModel(RESNET, file, image_size=64).build(images(), tmp_path).encode(images().evaluation)
        assert encoded.checksum() != other.checksum()

    def test_photos_are_read_as_well(self, file: str, tmp_path: Path) -> None:
        Image.new("RGB", (50, 40), (255, 0, 0)).save(tmp_path / "a.png")
        data = blank([tmp_path / "a.png"], 10)
        built = TimmModel(RESNET, file, image_size=24).build(data, tmp_path)
        (batch,) = built.encode(data.evaluation).batches(1, "cpu")
        assert batch.inputs["x"].shape == (1, 3, 24, 24)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [(torch.zeros(2, 1, 8, 8), "reads colour images, but this data set has 1x8x8"), (["a"], "reads photo files")],
    )
    def test_other_inputs_are_refused(self, file: str, tmp_path: Path, inputs: object, message: str) -> None:
        with pytest.raises(UserError, match=rf"^model=test_resnet.* {message}"):
            built = TimmModel(RESNET, file).build(blank(inputs, 10), tmp_path)
            built.encode(blank(inputs, 10).evaluation)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("resnet5O", r"model\.name=resnet5O: timm has no such network; did you mean 'resnet50'\?"),
            ("resnet50.tv_in2k", r"model\.name=resnet50\.tv_in2k: timm has resnet50\.a1_in1k, .* for resnet50"),
            ("hf-hub:someone/net", r"model\.name=hf-hub:someone/net: timm has no such network"),
        ],
    )
    def test_unknown(self, tmp_path: Path, cache: Path, name: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            TimmModel(name).build(images(1000), tmp_path)
        one_line(caught)

    @pytest.mark.parametrize("size", [0, "big", 2.5])
    def test_impossible_image_size(self, size: int) -> None:
        with pytest.raises(UserError, match=rf"^model\.image_size={size}: needs a whole number of pixels"):
            TimmModel(RESNET, image_size=size)

    def test_image_size_that_a_transformer_cannot_have(self, tmp_path: Path) -> None:
        torch.save(network(VIT, 10).state_dict(), tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"^model\.(image_size=7|checkpoint=)") as caught:
            TimmModel(VIT, str(tmp_path / "w.pt"), image_size=7).build(images(), tmp_path)
        one_line(caught)

    def test_every_yaml_names_published_weights_with_the_classes_of_imagenet(self) -> None:
        from omegaconf import OmegaConf
        from timm.models import get_arch_pretrained_cfgs

        found = {}
        for file in (ROOT / "conf" / "model").glob("*.yaml"):
            content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            assert isinstance(content, dict)
            if "timm" in content.get("defaults", []):
                assert content["name"] == file.stem
                found[file.stem] = get_arch_pretrained_cfgs(content["architecture"].partition(".")[0])[
                    content["architecture"]
                ]
        names = {"resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2", "vit_small", "convnext_tiny"}
        assert set(found) == names
        pins = {name: OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml").get("revision") for name in names}
        assert {name for name, pin in pins.items() if pin is None} == {"resnet101"}
        assert all(hub.COMMIT.fullmatch(pin) for pin in pins.values() if pin is not None)
        for published in found.values():
            assert published.num_classes == 1000 and published.hf_hub_id.startswith("timm/")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name", ["resnet18", "resnet50", "mobilenetv2_100", "vit_small_patch16_224", "convnext_tiny"]
    )
    def test_every_layer_can_be_quantized(self, name: str) -> None:
        module = network(name, 1000)
        wanted = {name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
        assert set(quantizable_layers(module)) == wanted


class TestAttention:
    def build(self, folder: Path, architecture: str) -> tuple[nn.Module, object]:
        size = {"img_size": 32} if architecture == VIT else {}
        torch.save(network(architecture, 10, **size).state_dict(), folder / "w.pt")
        built = TimmModel(architecture, str(folder / "w.pt"), image_size=32).build(images(), folder)
        return built.module, built.encode(images().evaluation)

    def test_attention_is_not_fused_and_gives_the_same_logits(self, tmp_path: Path) -> None:
        module, encoded = self.build(tmp_path, VIT)
        blocks = [part for part in module.modules() if hasattr(part, "fused_attn")]
        assert blocks and not any(part.fused_attn for part in blocks)
        (batch,) = encoded.batches(10, "cpu")  # type: ignore[attr-defined]
        with torch.no_grad():
            fused = network(VIT, 10, img_size=32)
            torch.testing.assert_close(module(**batch.inputs), fused(batch.inputs["x"]), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("architecture", [VIT, CONVNEXT, RESNET])
    def test_every_layer_gets_statistics_the_same_in_every_run(self, tmp_path: Path, architecture: str) -> None:
        module, encoded = self.build(tmp_path, architecture)
        layers = quantizable_layers(module)
        found = []
        for _ in range(2):
            kinds = (INPUT_MOMENT, GRADIENT_MOMENT, FISHER_DIAGONAL)
            collector = Collector(module, layers, kinds, None, torch.Generator().manual_seed(0))
            for batch in encoded.batches(3, "cpu"):  # type: ignore[attr-defined]
                collector.add(batch)
            tensors = {}
            for kind in kinds:
                statistics, unseen = dict(collector.finish(kind)), collector.unseen
                assert not unseen
                tensors |= {f"{kind.name}/{name}": value for name, value in statistics.items()}
            found.append(tensors)
        for name, value in found[0].items():
            assert torch.equal(value, found[1][name]), name
            assert value.isfinite().all() and value.any(), name


# ----------------------------------------------------------------------------------------------------------------- hub


class TestPublishedWeights:
    @pytest.mark.parametrize("offline", [True, False])
    def test_the_cache_is_enough(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        module = network(RESNET, 1000)
        put(cache, RESNET, module)
        built = TimmModel(RESNET).build(images(1000), tmp_path)
        assert built.checksum == state_checksum(module)
        assert (built.description["fp_source"], built.description["revision"]) == (f"timm/{RESNET}", COMMIT)

    def test_a_pinned_revision_is_the_one_loaded(self, tmp_path: Path, cache: Path) -> None:
        put(cache, RESNET, network(RESNET, 1000))
        assert TimmModel(RESNET, revision=COMMIT).build(images(1000), tmp_path).description["revision"] == COMMIT
        with pytest.raises(UserError, match=rf"timm/{RESNET} at model\.revision=9+ could not .*it cannot be reached"):
            TimmModel(RESNET, revision="9" * 40).build(images(1000), tmp_path)

    def test_other_classes_need_a_checkpoint(self, tmp_path: Path, cache: Path) -> None:
        put(cache, RESNET, network(RESNET, 1000))
        with pytest.raises(
            UserError, match=r"weights have 1000 classes, and this data set has 10: .*model\.checkpoint=FILE"
        ) as caught:
            TimmModel(RESNET).build(images(10), tmp_path)
        one_line(caught)

    def test_an_unreachable_hub_is_one_line_at_once(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        pytest.importorskip("timm")  # takes the function as it is when first imported
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # it would try for most of a minute
        with pytest.raises(
            UserError,
            match=rf"^model={RESNET}: timm/{RESNET} could not be read from the hub \(it cannot be reached: .*, and "
            r"the files are not in its cache here\): give the weights with model\.checkpoint=FILE$",
        ) as caught:
            TimmModel(RESNET).build(images(1000), tmp_path)
        one_line(caught)

    def test_offline_without_a_cached_file(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.get_session", None)
        with pytest.raises(
            UserError, match=r"HF_HUB_OFFLINE is set, and the files are not in its cache here\): .*model\.checkpoint"
        ):
            TimmModel(RESNET).build(images(1000), tmp_path)

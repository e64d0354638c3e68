"""The checksum of what decides a network's function beside its weights."""

import copy
import functools
import os
import subprocess
import sys
from collections import deque
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import nn

from bayesq.batches import TensorExamples
from bayesq.suite.fingerprint import fingerprint
from bayesq.suite.full_precision import cached_logits
from bayesq.suite.models.base import Network, state_checksum

ROOT = Path(__file__).parents[2]
TINY = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale

    def apply(self, x):
        return self.scale * x


class Net(nn.Module):
    """A network whose function hangs on plain attributes."""

    def __init__(self, **changed) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mask", changed.pop("mask", torch.ones(4)), persistent=False)
        attributes = {
            "heads": 2,
            "scale": 0.5,
            "activation": torch.tanh,
            "shape": (2, 2),
            "options": {"eps": 1e-5},
            "table": torch.zeros(3),
            "norm": functools.partial(nn.functional.layer_norm, eps=1e-5),
            "names": frozenset({"a", "b"}),
            "slope": np.float32(0.5),
            "array": np.zeros(3),
            "span": range(3),
            "queue": deque([1]),
            "share": Fraction(1, 3),
            "slotted": Slotted(1.0),
            "method": Slotted(1.0).apply,
        }
        for name, value in {**attributes, **changed}.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.activation(self.fc(x) * self.scale)


CHANGED = {
    "heads": 4,
    "scale": 0.25,
    "activation": torch.sigmoid,
    "shape": (4, 1),
    "options": {"eps": 1e-6},
    "table": torch.ones(3),
    "norm": functools.partial(nn.functional.layer_norm, eps=1e-6),
    "names": frozenset({"a", "c"}),
    "mask": torch.zeros(4),
    "slope": np.float32(0.25),
    "array": np.ones(3),
    "span": range(4),
    "queue": deque([2]),
    "share": Fraction(2, 3),
    "slotted": Slotted(2.0),
    "method": Slotted(2.0).apply,
}


def power(n: int):
    return lambda x: x**n


def test_equal_networks_have_equal_checksums_whatever_their_weights():
    net = Net()
    expected = fingerprint(net)
    assert fingerprint(Net()) == fingerprint(copy.deepcopy(net)) == expected
    nn.init.zeros_(net.fc.weight)
    assert fingerprint(net) == expected


@pytest.mark.parametrize("name", CHANGED)
def test_every_attribute_counts(name):
    assert fingerprint(Net(**{name: CHANGED[name]})) != fingerprint(Net())


def test_what_functions_hold_counts():
    assert fingerprint(Net(activation=power(2))) == fingerprint(Net(activation=power(2)))
    assert fingerprint(Net(activation=power(2))) != fingerprint(Net(activation=power(3)))
    assert fingerprint(Net(activation=lambda x: x + 1)) != fingerprint(Net(activation=lambda x: x - 1))


def test_names_nested_functions_hooks_and_classes_made_by_functions_count():
    def nested(sign):
        return (lambda x: (lambda y: y + 1)(x)) if sign else (lambda x: (lambda y: y - 1)(x))

    def made(slope):
        class Made(Net):
            steepness = slope

        return Made()

    assert fingerprint(Net(activation=lambda x: torch.sin(x))) != fingerprint(Net(activation=lambda x: torch.cos(x)))
    assert fingerprint(Net(activation=nested(True))) != fingerprint(Net(activation=nested(False)))
    assert fingerprint(made(1)) == fingerprint(made(1)) != fingerprint(made(2))
    hooked = Net()
    hooked.fc.register_forward_hook(lambda *_: None)
    assert fingerprint(hooked) != fingerprint(Net())


def test_a_helper_beside_the_users_file_counts(tmp_path):
    (tmp_path / "their_helper.py").write_text("SLOPE = 1\n")
    net = "import torch; import their_helper\n\nclass Net(torch.nn.Module):\n    pass\n"
    (tmp_path / "their_net.py").write_text(net)
    code = "import their_net; from bayesq.suite.fingerprint import fingerprint; print(fingerprint(their_net.Net()))"

    def known():
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
        given = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
        return subprocess.run([sys.executable, "-c", code], **given).stdout

    before = known()
    assert before == known()
    (tmp_path / "their_helper.py").write_text("SLOPE = 2\n")
    assert before != known()


def test_sharing_counts():
    shared, apart = (nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]) for _ in range(2))
    shared[1] = shared[0]
    assert fingerprint(shared) != fingerprint(apart)
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    assert fingerprint(tied) != fingerprint(apart)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("Bert", {"num_attention_heads": 4}),
        ("Bert", {"layer_norm_eps": 1e-6}),
        ("Bert", {"hidden_act": "gelu_new"}),
        ("Albert", {"num_hidden_layers": 5}),
        ("Albert", {"inner_group_num": 2}),
        ("DebertaV2", {"relative_attention": True}),
        ("Llama", {"rms_norm_eps": 1e-3}),
        ("Llama", {"attention_bias": True}),
        ("Gemma3Text", {"sliding_window": 3}),
        ("Mixtral", {"num_experts_per_tok": 1}),
    ],
)
def test_configurations_of_transformers_count(kind, changed):
    def build(**more):
        config = getattr(transformers, f"{kind}Config")(**{**TINY, **more})
        with torch.device("meta"):
            return getattr(transformers, f"{kind}Model")(config)

    def known(module):  # buffers of a meta network have no values to hash
        return fingerprint(module.to_empty(device="cpu").apply(_zero))

    assert known(build()) == known(build()) != known(build(**changed))


def _zero(module: nn.Module) -> None:
    for x in module.buffers(recurse=False):
        x.zero_()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("vit_tiny_patch16_224", {"num_heads": 6}),
        ("vit_tiny_patch16_224", {"class_token": True, "global_pool": "avg", "fc_norm": False}),
        ("resnet18", {"norm_layer": functools.partial(nn.BatchNorm2d, eps=1e-3)}),
        ("resnet18", {"act_layer": nn.LeakyReLU}),
        ("swin_tiny_patch4_window7_224", {"window_size": 4, "img_size": 64}),
    ],
)
def test_options_of_timm_count(name, changed):
    small = {"img_size": 64} if "img_size" in changed else {}
    assert fingerprint(timm.create_model(name, **small)) != fingerprint(timm.create_model(name, **changed))


def test_it_is_the_same_in_another_process():
    code = (
        "import timm; from bayesq.suite.fingerprint import fingerprint; "
        "print(fingerprint(timm.create_model('test_vit')))"
    )
    given = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    seen = {subprocess.run([sys.executable, "-c", code], **given).stdout for _ in range(2)}
    assert len(seen) == 1 and len(seen.pop().strip()) == 64


def test_logits_of_another_function_are_not_read_from_the_cache(tmp_path):
    """Two networks with the same weights and the same repr, as of two config files over one file of weights."""
    first, second = Net(), Net(scale=-3.0)
    second.load_state_dict(first.state_dict())
    examples = TensorExamples({"x": torch.eye(4)}, torch.zeros(4, dtype=torch.long))
    found = []
    for module in (first, second):
        network = Network(module.eval(), lambda _: examples, {})
        found.append(cached_logits(module, network.identity, examples, 4, torch.device("cpu"), tmp_path)[0])
    assert state_checksum(first) == state_checksum(second) and repr(first) == repr(second)
    torch.testing.assert_close(found[1], second(torch.eye(4)).detach())
    assert not torch.equal(*found)


def test_a_blueprint_is_part_of_the_identity():
    module = Net()
    identities = {
        Network(module, lambda _: None, {}, blueprint).identity
        for blueprint in ({}, {"order": [0, 1]}, {"order": [1, 0]})
    }
    assert len(identities) == 3

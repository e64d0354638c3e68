"""Run ids and value checks, on the real YAML files."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

import bayesq
from bayesq import defaults
from bayesq.defaults import conf_dir
from bayesq.suite import cli, composition, config, schema
from bayesq.suite.errors import UserError


def compose(*overrides: str) -> DictConfig:
    """The configuration Hydra composes from conf/, without its own node."""
    flight = composition.Preflight()
    try:
        cfg = flight.loader.load_configuration(composition.CONFIG_NAME, list(overrides), run_mode=RunMode.RUN)
    finally:
        GlobalHydra.instance().clear()
    return OmegaConf.create({key: cfg._get_node(key) for key in cfg if key != "hydra"})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def default() -> DictConfig:
    return compose()


def changed(cfg: DictConfig, key: str, value: Any) -> DictConfig:
    copy = OmegaConf.create(OmegaConf.to_container(cfg))
    assert isinstance(copy, DictConfig)
    OmegaConf.update(copy, key, value, force_add=True)
    return copy


def other(value: Any) -> Any:
    """A value that differs from `value` and has its type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, 7]
    return "other" if value is None else f"{value}x"


# ------------------------------------------------------------------------------------------------------------ run ids


def test_run_id_is_twelve_hexadecimal_digits_and_repeatable(default: DictConfig) -> None:
    assert config.run_id(default) == config.run_id(compose())
    assert len(config.run_id(default)) == 12
    assert int(config.run_id(default), 16) >= 0


def test_every_key_changes_the_run_id_except_where_how_and_whether(default: DictConfig) -> None:
    # a data set that reads calibration.source has a key of its own for it
    metadata = {"method.allocator", "method.uses_posterior", "calibration.offload", "calibration.source"}
    metadata |= {f"method.display.{key}" for key in ("title", "color", "marker", "order")}
    pinned = changed(default, "allocator", "knapsack")
    assert config.run_id(pinned) == config.run_id(default), "the default method allocates by knapsack"
    # sections are read when their stage is on
    pinned = changed(changed(pinned, "distill", True), "proxy", "mc")
    pinned = changed(pinned, "evaluation.zeroshot", ["piqa"])
    own = config.run_id(pinned)
    for key, value in config.flatten(config.resolved(pinned)).items():
        if key == "allocator":
            continue
        same = config.run_id(changed(pinned, key, other(value))) == own
        without_effect = key.split(".")[0] in config.WITHOUT_EFFECT or key in metadata
        without_effect = without_effect or key.startswith("method.required.")
        assert same == without_effect, key


@pytest.mark.parametrize("section", ["distillation", "monte_carlo"])
def test_settings_of_a_stage_that_is_off_do_not_count(default: DictConfig, section: str) -> None:
    for key, value in default[section].items():
        assert config.run_id(changed(default, f"{section}.{key}", other(value))) == config.run_id(default), key


def test_a_folder_of_questions_without_tasks_does_not_count(default: DictConfig) -> None:
    for key, value in (("zeroshot_root", "questions"), ("zeroshot_limit", 9)):
        assert config.run_id(changed(default, f"evaluation.{key}", value)) == config.run_id(default), key


def test_the_text_to_calibrate_on_belongs_to_language_models() -> None:
    given = [*("model=causal_lm", "dataset=text", "dataset.path=a"), "calibration.source=b"]
    assert config.run_id(compose(*given)) != config.run_id(compose(*given[:-1]))
    with pytest.raises(UserError, match=r"calibration\.source=b: dataset=movie_snippets has calibration examples"):
        schema.validate(compose("calibration.source=b"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["proxy=mcmc"], "proxy=mcmc: choose one of none, mc"),
        (["proxy=mc", "method=gptq"], "proxy=mc: .*allocator=knapsack"),
        (["correction=moment"], "correction=moment: choose one of none, mean, moments; did you mean 'moments'"),
        (["distill=1"], "distill=1: needs true or false"),
        (["distill=true", "calibration.examples=4"], "calibration.examples=4: distill=true has to hold out"),
        (["monte_carlo.examples=0"], "monte_carlo.examples=0"),
    ],
)
def test_stages_are_checked_before_anything_runs(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        schema.validate(compose(*overrides))


# switches that would change nothing -> what refuses them
UNREAD = {
    "method=rtn codec=entropy method.group_size=9": (
        "method.group_size=9: has no effect with codec=entropy; choose null"
    ),
    "method=rtn codec=entropy method.clip=minmax": "method.clip=minmax: has no effect with codec=entropy; choose mse",
    "method=gptq codec=entropy method.symmetric=true": (
        "method.symmetric=true: has no effect with codec=entropy; choose false"
    ),
    "method=gptq codec=entropy method.clip=mse": "method.clip=mse: has no effect with codec=entropy; choose auto",
    "method=gptaq codec=entropy method.clip=mse": "method.clip=mse: has no effect with codec=entropy; choose auto",
    "method=qronos codec=entropy method.clip=mse": "method.clip=mse: has no effect with codec=entropy; choose auto",
    "method=awq codec=entropy method.clip_steps=5": "method.clip_steps=5: has no effect with codec=entropy; choose 20",
    "method=squeezellm method.sensitive=0.5": "method.sensitive=0.5: has no effect with method.sparse=0; choose 0.11",
    "method.levels=lloyd method.states=256": "method.states=256: has no effect with method.levels=lloyd; choose 1024",
    "codec=entropy method.levels=uniform": (
        "method.levels=uniform: has no effect with codec=entropy; choose trellis or lloyd"
    ),
    "method.refits=0 method.levels=lloyd": (
        "method.levels=lloyd: has no effect with codec=fixed method.refits=0; choose trellis or uniform"
    ),
    "method=gptq method.sequential=false inputs=prefix": (
        "method.sequential=false: is the old name of inputs, and inputs=prefix is given; leave one out"
    ),
    "allocation.group_rows=4": (
        "allocation.group_rows=4: is not read with allocation.block=row; leave it at 8, or choose "
        "allocation.block=group"
    ),
    "distillation.steps=2": (
        "distillation.steps=2: is not read with distill=false; leave it at 1, or choose distill=true"
    ),
    "monte_carlo.samples=1": "monte_carlo.samples=1: is not read with proxy=none; leave it at 4, or choose proxy=mc",
}
# the same switches at their defaults, or where they are read
READ = [
    "method=rtn codec=entropy method.group_size=null method.symmetric=false method.clip=mse",
    "method=rtn method.group_size=16 method.symmetric=true method.clip=minmax",
    "method=squeezellm method.sensitive=0.5 method.sparse=0.01",
    "method.levels=lloyd method.states=1024",
    "method.refits=0 method.levels=uniform",
    "method.refits=0 method.levels=lloyd codec=entropy",
    "method=gptq method.sequential=false",
    "method=gptq method.sequential=false inputs=full",
    "allocation.group_rows=4 allocation.block=group",
    "distillation.steps=2 distill=true",
    "distillation.steps=1",
    "monte_carlo.samples=1 proxy=mc",
]


@pytest.mark.parametrize("overrides", UNREAD)
def test_a_switch_that_would_change_nothing_is_refused(overrides: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(UNREAD[overrides])}$"):
        schema.validate(compose(*overrides.split()))


@pytest.mark.parametrize("overrides", READ)
def test_a_switch_that_is_read_or_has_its_default_is_taken(overrides: str) -> None:
    schema.validate(compose(*overrides.split()))


@pytest.mark.parametrize("method", defaults.choices("method"))
def test_no_default_of_a_method_is_refused(method: str) -> None:
    for codec in ("fixed", "entropy"):
        schema.validate(compose(f"method={method}", f"codec={codec}"))


def test_arguments_of_the_library_are_refused_alike() -> None:
    module = torch.nn.Linear(8, 4).eval()
    with pytest.raises(ValueError, match=r"^group_size=16: has no effect with codec=entropy; choose null$"):
        bayesq.quantize(module, [torch.ones(4, 8)], bits=3, method="rtn", codec="entropy", group_size=16)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["bits=3"], ["bits=3.0"]),
        (
            ["results_dir=here"],
            ["results_dir=/there", "device=cuda:1", "force=true", "cache_dir=x", "wandb.mode=disabled"],
        ),
        (["bits=3"], ["bits=3", "wandb.log_artifact=true", "wandb.registry=model"]),
        (["method=gptq", "posterior=diag"], ["method=gptq", "posterior=kfac"]),
        (["method=gptq", "allocation.block=layer"], ["method=gptq", "allocation.widths=[2,8]"]),
        (["allocation.widths=[2,3,8]"], ["allocation.widths=[8,2,3]"]),
        (["+allocation.allowed={a:[2,8]}"], ["+allocation.allowed={a:[8,2]}"]),
        (["method=gptq"], ["method=gptq", "+allocation.pinned={a:8}", "allocation.min_width=3"]),
        (["layers.exclude=[a,b]"], ["layers.exclude=[b,a,b]"]),
        (["method=gptq"], ["method=gptq", "allocator=uniform"]),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_what_has_no_effect_does_not_change_the_run_id(one: list[str], two: list[str]) -> None:
    assert config.run_id(compose(*one)) == config.run_id(compose(*two))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["bits=3"], ["bits=3.5"]),
        (["seed=0"], ["seed=1"]),
        (["method=gptq"], ["method=rtn"]),
        (["posterior=diag"], ["posterior=kfac"]),
        (["posterior=diag", "allocator=uniform"], ["posterior=kfac", "allocator=uniform"]),
        (
            ["method=gptq", "allocator=knapsack", "posterior=diag"],
            ["method=gptq", "allocator=knapsack", "posterior=kfac"],
        ),
        (["allocator=uniform"], ["allocator=knapsack"]),
        (["allocation.block=row"], ["allocation.block=layer"]),
        (["allocation.block=row"], ["allocation.block=group"]),
        ([], ["+allocation.pinned={a:8}"]),
        (["+allocation.pinned={a*:8,*:4}"], ["+allocation.pinned={*:4,a*:8}"]),
        (["+allocation.allowed={a*:[8],*:[4]}"], ["+allocation.allowed={*:[4],a*:[8]}"]),
        (["model=resnet", "dataset=digits"], []),
    ],
    ids=lambda overrides: " ".join(overrides) or "default",
)
def test_what_has_an_effect_changes_the_run_id(one: list[str], two: list[str]) -> None:
    assert config.run_id(compose(*one)) != config.run_id(compose(*two))


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq", "awq"])
def test_newer_switches_count_only_away_from_their_neutral_values(method: str) -> None:
    now = compose(f"method={method}")
    older = config.resolved(now)
    neutral = older["method"]["neutral"]
    older["method"] = {key: value for key, value in older["method"].items() if key not in ("neutral", *neutral)}
    assert config.id_of(config.settings_that_matter(older), bayesq.__version__) == config.run_id(now)
    for key, value in (("symmetric", True), ("group_size", 64)):
        assert config.run_id(compose(f"method={method}", f"method.{key}={value}")) != config.run_id(now)


def test_a_new_version_of_bayesq_has_its_own_run_ids(default: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = config.run_id(default)
    monkeypatch.setattr(bayesq, "__version__", "99.0")
    assert config.run_id(default) != before


def test_the_resolver_names_the_folder_of_the_whole_config(default: DictConfig) -> None:
    with_hydra = changed(default, "hydra", {"run": {"dir": "${results_dir}/${run_id:}"}})
    assert with_hydra.hydra.run.dir == f"results/{config.run_id(default)}"
    assert config.run_dir(default) == Path.cwd() / "results" / config.run_id(default)


def test_what_determines_the_result_survives_json(default: DictConfig) -> None:
    content = config.settings_that_matter(config.resolved(default))
    assert json.loads(json.dumps(content)) == content
    assert content["allocator"] == "knapsack"
    assert "_target_" in content["method"]


# ----------------------------------------------------------------------------------------------------- value checks


BAD_VALUES = [
    ("bits", 1.99),
    ("bits", 8.01),
    ("bits", math.nan),
    ("bits", True),
    ("bits", None),
    ("bits", "3"),
    ("seed", -1),
    ("seed", 1.5),
    ("seed", 2**32),
    ("force", "perhaps"),
    ("device", "gpu"),
    ("device", "cuda:"),
    ("device", None),
    ("allocator", "greedy"),
    ("allocator", ["uniform"]),
    ("allocation.widths", []),
    ("allocation.widths", [2, 2, 3]),
    ("allocation.widths", [1, 4]),
    ("allocation.widths", [4, 9]),
    ("allocation.widths", [2.5, 4]),
    ("allocation.widths", [True, 4]),
    ("allocation.widths", 4),
    ("allocation.widths", [5, 6]),
    ("allocation.widths", [2, 3]),
    ("allocation.group_rows", 0),
    ("allocation.group_rows", 2.5),
    ("allocation.row_multiple", 0),
    ("allocation.row_multiple", None),
    ("allocation.min_width", 1),
    ("allocation.min_width", 9),
    ("allocation.min_width", True),
    ("allocation.min_width", "3"),
    ("allocation.min_width", 5),
    ("allocation.pinned", 8),
    ("allocation.pinned", None),
    ("allocation.pinned", {"head": 9}),
    ("allocation.pinned", {"head": [8]}),
    ("allocation.pinned", {"*": 5}),
    ("allocation.pinned", {"*": 3}),
    ("allocation.allowed", 8),
    ("allocation.allowed", {"head": 8}),
    ("allocation.allowed", {"head": []}),
    ("allocation.allowed", {"head": [4, 4]}),
    ("allocation.allowed", {"head": [1, 4]}),
    ("allocation.allowed", {"*": [5, 6]}),
    ("budget.count", "bytes"),
    ("proxy", True),
    ("proxy", None),
    ("monte_carlo.samples", -1),
    ("monte_carlo.samples", 1.5),
    ("monte_carlo.examples", 0),
    ("monte_carlo.examples", None),
    ("correction", False),
    ("correction", ["moments"]),
    ("distill", "yes"),
    ("distill", None),
    ("distillation.samples", -1),
    ("distillation.samples", True),
    ("distillation.moments", "yes"),
    ("distillation.steps", 2.5),
    ("distillation.evaluations", "4"),
    ("distillation.held_out", math.nan),
    ("distillation.held_out", "half"),
    ("distillation.batch_size", 0),
    ("distillation.batch_size", None),
    ("calibration.examples", 0),
    ("calibration.examples", -5),
    ("calibration.examples", 2.5),
    ("calibration.examples", "many"),
    ("calibration.examples", None),
    ("calibration.examples", 10**6),
    ("calibration.batch_size", 0),
    ("evaluation.batch_size", "all"),
    ("dataset.limit", 0),
    ("dataset.limit", 10**7),
    ("dataset.calibration_pool", 0),
    ("dataset.evaluation", -1),
    ("layers.exclude", "head"),
    ("layers.exclude", [3]),
    ("wandb.mode", "of"),
    ("wandb.project", ""),
    ("wandb.project", None),
    ("wandb.entity", 5),
    ("wandb.log_artifact", "always"),
    ("wandb.registry", ""),
    ("wandb.registry", "team/model"),
    ("wandb.registry", "model"),
    ("results_dir", None),
    ("results_dir", ""),
    ("results_dir", 2026),
    ("results_dir", "~/results"),
    ("results_dir", "/proc/no-such-folder"),
    ("results_dir", f"{__file__}"),
    ("results_dir", f"{__file__}/below"),
    ("cache_dir", "/proc/no-such-folder"),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=lambda part: str(part)[-40:])
def test_a_bad_value_is_one_line_with_its_key_and_value(default: DictConfig, key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        schema.validate(changed(default, key, value))
    message = str(caught.value)
    assert message.startswith(f"{key}={config.show(value)}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 2),
        ("bits", 8.0),
        ("bits", 2.25),
        ("seed", 2**32 - 1),
        ("device", "cuda:3"),
        ("allocation.widths", [4]),
        ("allocation.min_width", 4),
        ("allocation.pinned", {"*": 4}),
        ("allocation.pinned", {"head": 7}),
        ("allocation.pinned", {"*": 8, "head": 2}),
        ("allocation.pinned", {0: 8}),
        ("allocation.allowed", {"head": [2, 7], "*": [3, 8]}),
        ("allocation.row_multiple", 3),
        ("dataset.limit", 1),
        ("wandb.entity", "team"),
    ],
    ids=str,
)
def test_values_at_the_edge_are_accepted(default: DictConfig, tmp_path: Path, key: str, value: Any) -> None:
    schema.validate(changed(changed(default, "results_dir", str(tmp_path / "new" / "folder")), key, value))


def test_the_whole_pool_can_calibrate(default: DictConfig, tmp_path: Path) -> None:
    cfg = changed(default, "results_dir", str(tmp_path))
    pool = cfg.dataset.calibration_pool
    schema.validate(changed(cfg, "calibration.examples", pool))
    with pytest.raises(UserError, match=rf"^calibration.examples={pool + 1}: .*from 1 to {pool}\b"):
        schema.validate(changed(cfg, "calibration.examples", pool + 1))


@pytest.mark.parametrize(("key", "value"), [("widths", [5, 6]), ("pinned", {"head": 8}), ("block", "layer")])
def test_a_uniform_allocator_refuses_keys_that_it_does_not_read(
    default: DictConfig, tmp_path: Path, key: str, value: Any
) -> None:
    uniform = changed(changed(default, "allocator", "uniform"), "results_dir", str(tmp_path))
    schema.validate(uniform)
    with pytest.raises(UserError, match=rf"^allocation\.{key}=.*allocator=uniform; .*or choose allocator=knapsack"):
        schema.validate(changed(uniform, f"allocation.{key}", value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_width": 5}, "min_width=5: no mix .* averages bits=4; they allow budgets from 5 to 8"),
        ({"widths": [2, 3, 4], "min_width": 6}, r"widths=\[2,3,4\]: allocation.min_width=6 leaves '\*' no width"),
        ({"min_width": 3, "pinned": {"head": 2}}, r"pinned=\{head:2\}: allocation.min_width=3 leaves 'head' no width"),
        ({"min_width": 4, "allowed": {"a": [2, 3]}}, r"allowed=\{a:\[2,3\]\}: allocation.min_width=4 leaves 'a' no"),
        ({"pinned": {"*": 5}}, "pinned=.*: no mix of the .* averages bits=4; they allow budgets from 5 to 5"),
        ({"pinned": {"a": 6}, "allowed": {"*": [5, 8]}}, "allowed=.*: no mix .*; they allow budgets from 5 to 8"),
        ({"widths": [6, 8], "pinned": {"a": 5}}, "widths=.*: no mix .*; they allow budgets from 5 to 8"),
    ],
    ids=str,
)
def test_rules_that_cannot_be_kept_together_are_found_early(
    default: DictConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    cfg = changed(default, "results_dir", str(tmp_path))
    for key, value in changes.items():
        cfg = changed(cfg, f"allocation.{key}", value)
    with pytest.raises(UserError, match=rf"^allocation\.{message}"):
        schema.validate(cfg)


def test_rules_for_layers_are_added_on_the_command_line(tmp_path: Path) -> None:
    rules = ["+allocation.pinned={conv1:8,*.head.0:6}", "+allocation.allowed={0:[2,4],layer?.*:[4,8]}"]
    (job,) = cli.preflight([*rules, "allocation.min_width=3", f"results_dir={tmp_path}"]) or []
    assert job.config["allocation"]["pinned"] == {"conv1": 8, "*.head.0": 6}
    assert list(job.config["allocation"]["allowed"].values()) == [[2, 4], [4, 8]]
    assert job.config["allocation"]["min_width"] == 3
    (job,) = cli.preflight(["allocation.pinned={conv1:8}", f"results_dir={tmp_path}"]) or []
    assert job.config["allocation"]["pinned"] == {"conv1": 8}, "no + is needed"


IMAGES, TEXTS = "image classification", "text classification"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model=resnet"], f"dataset=movie_snippets is for {TEXTS}, but model=resnet is for {IMAGES}"),
        (["dataset=digits"], f"dataset=digits is for {IMAGES}, but model=minilm is for {TEXTS} or text regression"),
    ],
)
def test_a_model_and_its_data_have_a_task_in_common(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError, match=f"{line}: .*model=minilm dataset=movie_snippets, model=resnet dataset=digits"):
        schema.validate(compose(*overrides))


def test_an_unusable_cache_folder_from_the_environment_is_found(
    default: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAYESQ_CACHE_DIR", "/proc/no-such-folder")
    with pytest.raises(UserError, match=r"^cache_dir=/proc/no-such-folder: "):
        schema.validate(changed(default, "results_dir", str(tmp_path)))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_found(default: DictConfig, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"^results_dir="):
        schema.validate(changed(default, "results_dir", str(tmp_path)))


def test_a_mandatory_value_that_was_not_given_is_named(default: DictConfig) -> None:
    with pytest.raises(UserError, match=r"^dataset.root has no default: add dataset.root=VALUE$"):
        schema.validate(changed(default, "dataset.root", "???"))


def test_a_reference_to_nothing_is_named(default: DictConfig) -> None:
    with pytest.raises(UserError, match=r"^bits: .*nothing"):
        schema.validate(changed(default, "bits", "${nothing}"))


def test_a_missing_accelerator_is_named(default: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^device=cuda: .*choose auto or cpu"):
        config.check_device(changed(default, "device", "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config.check_device(changed(default, "device", "cuda:1"))
    with pytest.raises(UserError, match=r"^device=cuda:2: this machine has cuda:0, cuda:1"):
        config.check_device(changed(default, "device", "cuda:2"))


def test_online_tracking_needs_a_key(default: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    online = changed(default, "wandb.mode", "online")
    with pytest.raises(UserError, match=r"^wandb.mode=online: no W&B API key .*wandb.mode=offline"):
        config.check_wandb_login(online)
    monkeypatch.setenv("WANDB_API_KEY", "tooshort")
    with pytest.raises(UserError, match=r"^wandb.mode=online: .*wandb.mode=offline"):
        config.check_wandb_login(online)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")  # what is typed comes before it
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # the client reads its settings once
    try:
        config.check_wandb_login(online)
    finally:
        wandb.teardown()


def test_a_key_in_the_netrc_file_is_found(default: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine wandb.example.org login user password {'0' * 40}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # the client reads its settings once
    try:
        config.check_wandb_login(changed(default, "wandb.mode", "online"))
    finally:
        wandb.teardown()


# ------------------------------------------------------------------------------------------------------- keys, types


REFERENCE = {"bits": 4, "method": {"damping": 0.01, "act_order": True, "options": {}}, "widths": [2, 3], "note": None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bitz": 3}, "unknown key 'bitz'; did you mean 'bits'?"),
        (
            {"method": {**REFERENCE["method"], "dampng": 1}},
            "unknown key 'method.dampng'; did you mean 'method.damping'?",
        ),  # type: ignore[dict-item]
        ({"damping": 1}, "unknown key 'damping'; did you mean 'method.damping'?"),
        ({"qqq": 1}, "unknown key 'qqq'"),
        (
            {"method": None},
            "method=null: 'method' is a group of keys: method.damping, method.act_order, method.options",
        ),
    ],
)
def test_keys_that_nothing_reads_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.check_keys({**REFERENCE, **given}, REFERENCE)
    assert str(caught.value) == message


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match=r"^'bits' is missing"):
        config.check_keys({key: value for key, value in REFERENCE.items() if key != "bits"}, REFERENCE)


def test_a_mapping_that_is_empty_in_the_yaml_takes_any_key() -> None:
    config.check_keys({**REFERENCE, "method": {**REFERENCE["method"], "options": {"depth": {"x": 1}}}}, REFERENCE)  # type: ignore[dict-item]


def test_the_schema_has_the_keys_of_the_yaml_file_and_takes_its_defaults() -> None:
    written = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"), resolve=False)
    assert isinstance(written, dict)
    written = {str(key): value for key, value in written.items() if key not in ("defaults", "hydra")}
    described = {key for key in schema.RULES if not key.startswith("dataset.")}
    assert described == set(config.flatten(written))
    schema.check(config.resolved(compose()))


CLASSES = sorted(file for file in conf_dir().glob("*/*.yaml") if "\n_target_:" in file.read_text())


@pytest.mark.parametrize("file", CLASSES, ids=lambda file: file.stem)
def test_the_constructor_of_every_choice_declares_the_types_of_its_yaml_file(file: Path) -> None:
    content = OmegaConf.load(file)
    hints = get_type_hints(get_class(content._target_).__init__)
    for key, value in OmegaConf.to_container(content, resolve=False).items():  # type: ignore[union-attr]
        if key in (*defaults.DESCRIPTIVE, "_target_"):
            continue
        assert key in hints, key
        assert value == "???" or "${" in str(value) or defaults.fits(value, hints[key]), key


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [3], [3.5, True, "3", None]),
        (float, [3, 0.5], [True, "3", None]),
        (bool, [True], [1, "yes"]),
        (str, ["x"], [3, None]),
        (int | None, [3, None], [0.5, "null"]),
        (Sequence[int], [[], [1, 2]], [3, "12", [1, "2"], None]),
        (Mapping[str, Sequence[str]] | None, [None, {"a": ["b"]}], [{"a": "b"}, ["a"]]),
        (torch.dtype, ["anything"], []),
    ],
    ids=str,
)
def test_values_are_compared_with_declared_types(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(defaults.fits(value, hint) for value in good)
    assert not any(defaults.fits(value, hint) for value in bad)


def test_null_is_documented_exactly_where_a_posterior_takes_it() -> None:
    for file in (conf_dir() / "posterior").glob("*.yaml"):
        hints = get_type_hints(get_class(OmegaConf.load(file)._target_).__init__)
        documented = {
            line.split(":")[0] for line in file.read_text().splitlines() if re.match(r"\w+: .*# .*null: ", line)
        }
        assert documented == {key for key, hint in hints.items() if defaults.fits(None, hint) and key != "return"}


def test_entropy_coding_takes_budgets_from_one_bit_and_leaves_other_run_ids(default: DictConfig) -> None:
    plain = OmegaConf.to_container(default)
    assert isinstance(plain, dict) and plain.pop("codec") == "${oc.select:method.codec,fixed}"
    assert config.run_id(OmegaConf.create(plain)) == config.run_id(default)  # the id of a record of an older version
    assert config.run_id(changed(default, "codec", "entropy")) != config.run_id(default)
    schema.validate(compose("codec=entropy", "bits=1.5"))
    for overrides, least in ((["bits=1.5"], 2), (["codec=entropy", "bits=0.9"], 1), (["codec=entropy", "bits=9"], 1)):
        with pytest.raises(UserError, match=f"needs a number from {least} to 8 .bits per weight."):
            schema.validate(compose(*overrides))
    with pytest.raises(UserError, match="codec=huffman: choose one of fixed, entropy"):
        schema.validate(compose("codec=huffman"))


@pytest.mark.parametrize(
    ("override", "shown"),
    [("block=layer", "block=layer"), ("widths=[2,4]", r"widths=\[2,4\]"), ("min_width=3", "min_width=3")],
)
def test_keys_of_widths_are_refused_where_rows_have_steps(override: str, shown: str) -> None:
    message = f"allocation.{shown}: is not read with codec=entropy, whose rows have steps and no widths; leave it at"
    for allocator in ("knapsack", "ilp", "uniform"):
        overrides = [f"allocator={allocator}", f"allocation.{override}"]
        with pytest.raises(UserError, match=message):
            schema.validate(compose("codec=entropy", *overrides))
        schema.validate(compose("codec=entropy", f"allocator={allocator}"))
        if allocator != "uniform":
            schema.validate(compose(*overrides))


@pytest.mark.parametrize("group", ["model", "dataset"])
def test_a_file_without_tasks_is_refused(group: str) -> None:
    given = config.resolved(composition.Preflight().compose_job([])[0])
    schema.validate(OmegaConf.create(given))
    del given[group]["tasks"]
    with pytest.raises(
        UserError, match=rf"^{group}\.tasks is missing in the YAML file of {group}={given[group]['name']}"
    ):
        schema.validate(OmegaConf.create(given))

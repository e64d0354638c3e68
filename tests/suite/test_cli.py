"""The command line: what it refuses before anything runs, and how it runs, skips, fails and sums up.

Real runs belong to the end-to-end tests; here a small stand-in takes the runner's place.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from finished_runs import load_results

import bayesq
from bayesq.defaults import choices
from bayesq.files import lock
from bayesq.suite import cli, composition, config, results
from bayesq.suite.errors import UserError

ROOT = Path(__file__).parents[2]

# seed 13 is the user's mistake, seed 14 a defect (REPAIRED in the environment lets both succeed), 15 is killed, and
# what 16 fails of keeps its reason from being written
STAND_IN = """
import os, shutil, signal, sys, types
from bayesq.suite import config, results
from bayesq.suite.errors import UserError

def run(cfg, previous):
    if cfg.seed == 13 and "REPAIRED" not in os.environ:
        raise UserError("model.checkpoint=x: there is no such\\nfile")
    if cfg.seed == 14 and "REPAIRED" not in os.environ:
        raise ZeroDivisionError("second\\nline")
    if cfg.seed == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.seed == 16:  # a file in place of the run's folder takes no file, as a full disk
        shutil.rmtree(config.run_dir(cfg))
        config.run_dir(cfg).touch()
        raise OSError(28, "No space left on device")
    axes = {axis: cfg[axis].name for axis in ("model", "dataset", "method")}
    with open("ran.txt", "a") as file:
        file.write(f"{cfg.method.name} {cfg.bits} {cfg.seed}\\n")
    if "INHERITED" in os.environ:
        with open("inherited.txt", "a") as file:
            file.write(f"{previous[0] if previous else None}\\n")
    previous[:] = [f"of seed {cfg.seed}"]
    results.write_json(config.run_dir(cfg) / "result.json", {
        "status": "finished", "run_id": config.run_id(cfg), **axes, "seed": cfg.seed, "bits/target": cfg.bits,
        "primary_metric": "accuracy", "q/accuracy": 0.5, "delta/accuracy": -0.25, "fp/accuracy": 0.75,
        "config": config.resolved(cfg),
    })

sys.modules["bayesq.suite.runner"] = types.SimpleNamespace(run=run)
sys.modules["bayesq.suite.plan"] = types.SimpleNamespace(check_objects=lambda configs: None)
from bayesq.suite.cli import main
main()
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def start(*arguments: str, stand_in: bool = True, **environment: str) -> subprocess.Popen[str]:
    """Start the program in the current folder as a process of its own."""
    program = ["-c", STAND_IN] if stand_in else [str(ROOT / "run.py")]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def command(*arguments: str, stand_in: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in the current folder and wait for it."""
    process = start(*arguments, stand_in=stand_in, **environment)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def finished(job: cli.Job) -> dict[str, object]:
    """What a result needs for the table."""
    axes = {axis: job.config[axis]["name"] for axis in ("model", "dataset", "method")}
    numbers = {"q/accuracy": 0.5, "delta/accuracy": -0.25, "fp/accuracy": 0.75, "bits/target": job.config["bits"]}
    return {**axes, **numbers, "seed": job.config["seed"], "primary_metric": "accuracy", "config": job.config}


def runs() -> list[str]:
    return Path("ran.txt").read_text().splitlines() if Path("ran.txt").exists() else []


# --------------------------------------------------------------------------------------------- before anything runs


BAD_COMMANDS = [
    # what is typed, what the line must name
    (["bitz=3"], "bitz"),
    (["+bitz=3"], "bitz"),
    (["++bitz=3"], "bitz"),
    (["calibration.exmples=3"], "calibration.examples"),
    (["+calibration.exmples=3"], "calibration.exmples"),
    (["+method.no_such_option=1"], "method.no_such_option"),
    (["++posterior.no_such_option=1"], "posterior.no_such_option"),
    (["+calibration={no_such_option: 1}"], "calibration.no_such_option"),
    (["methd=gptq"], "did you mean 'method'?"),
    (["-m", "bitz=3,4"], "bitz"),
    (["~bits"], "bits"),
    (["~method"], "method"),
    (["~bitz"], "bitz"),
    (["bits"], "cannot read 'bits': write key=value"),
    (["bits=[3"], "bits=[3"),
    (["bits=${nothing}"], "bits"),
    (["bits=9"], "bits=9: needs a number from 2 to 8"),
    (["bits=1.9"], "bits=1.9"),
    (["bits=three"], "bits=three"),
    (["bits=[3,4]"], "bits=[3,4]"),
    (["bits=3,3.5,4"], "add -m"),
    (["-m", "method=bayesq,gptq", "bits=3,11"], "bits=11"),
    (["-m", "bits=3,4", "seed=range(-1,1)"], "seed=-1"),
    (["method=gtpq"], f"method=gtpq: choose one of {', '.join(choices('method'))}; did you mean 'gptq'?"),
    (["-m", "method=gptq,foo"], "method=foo"),
    (["method=null"], "method=null"),
    (["model=resnet51"], "model=resnet51"),
    (["dataset=cifar"], "dataset=cifar"),
    (["posterior=full"], "posterior=full"),
    (["experiment=x"], "experiment=x: choose one of"),
    (["model=resnet"], "dataset=digits"),
    (["calibration.examples=-1"], "calibration.examples=-1"),
    (["calibration.examples=0"], "calibration.examples=0"),
    (["calibration=5"], "calibration.examples"),
    (["wandb=null"], "wandb.mode"),
    (["allocation.widths=[]"], "allocation.widths=[]"),
    (["allocation.widths=[5,6]", "bits=4"], "allocation.widths=[5,6]"),
    (["results_dir=/proc/no-such-folder"], "results_dir=/proc/no-such-folder"),
    (["cache_dir=/proc/no-such-folder"], "cache_dir=/proc/no-such-folder"),
    (["wandb.mode=sometimes"], "wandb.mode=sometimes"),
    (["wandb.mode=online"], "wandb.mode=offline"),
    (["device=cuda0"], "device=cuda0"),
    (["force=maybe"], "force=maybe"),
    (["hydra.no_such_option=1"], "hydra.no_such_option"),
    (["hydra/launcher=no_such_launcher"], "no_such_launcher"),
    (["--no-such-option"], "--no-such-option"),
    (["bits=3", "-m", "--no-such-option", "seed=1"], "--no-such-option"),
    (["-m", "seed=range(3,3)"], "seed=range(3,3): there is no such value"),
    (["-m", "method=glob(zz*)"], "method=glob(zz*): there is no such value"),
    (["-m", "posterior=glob(*,exclude=*)"], "posterior=glob(*,exclude=*)"),
    (["-m", "bits=interval(2,4)"], "bits=interval(2,4): list the values"),
    (["-m", "seed=tag(few,interval(0,3))"], "list the values"),
    (["-m", "posterior=lowrank,diag", "posterior.rank=4"], "unknown key 'posterior.rank' [posterior=diag]"),
    (
        ["-m", "method=gptq", "ablation=glob(refits*)"],
        "ablation=refits_0 with method=gptq: unknown key 'method.refits'",
    ),
    (["ablation=rounding_nearest", "method=awq"], "ablation=rounding_nearest with method=awq: unknown key"),
    (["-m", "method=bayesq,rtn", "ablation=states_256"], "[method=rtn]"),
    (["-m", "ablation=full,proxy_mc", "method=gptq"], "proxy=mc"),
    (["-m", "calibration.examples=64,5000"], "[calibration.examples=5000]"),
    (["--config-dir", "/no-such-folder"], "/no-such-folder"),
    (["--config-name", "no_such_config"], "no_such_config"),
]


@pytest.mark.parametrize(
    ("arguments", "named"), BAD_COMMANDS, ids=lambda part: " ".join(part) if isinstance(part, list) else ""
)
def test_bad_input_is_one_line_and_exit_code_1_before_anything_is_loaded(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    for heavy in ("torch", "transformers", "timm", "sklearn", "bayesq.suite.runner"):
        monkeypatch.setitem(sys.modules, heavy, None)  # importing it now raises
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    assert left.value.code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
    assert not list(Path().glob("*/*")), "nothing was run or written"


def test_a_missing_accelerator_is_found_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(UserError, match=r"^device=cuda:99: "):
        cli.preflight(["device=cuda:99"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"^device=cuda: this machine has no device cuda; choose auto or cpu"):
            cli.preflight(["-m", "device=cpu,cuda"])


def test_the_real_program_refuses_in_one_line() -> None:
    done = command("bits=9", stand_in=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: bits=9: needs a number from 2 to 8 (bits per weight)\n"
    assert list(Path().iterdir()) == []


def test_a_shell_completes_both_programs(tmp_path: Path) -> None:
    """What bash offers after the lines that the program prints for it."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "ours.yaml").write_text("name: ours\n")
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    for name, text in {
        "bayesq-run": f"#!{sys.executable}\nfrom bayesq.suite.cli import main\nmain()\n",
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "other.py").write_text("print('dataset=important')\nopen('other_ran', 'w')\n")
    lines = [("bayesq-run dataset=im", 1), ("bayesq-run -cd conf method=o", 3), ("python run.py dataset=im", 2)]
    lines.append(("python other.py dataset=im", 2))
    script = 'eval "$(bayesq-run -sc install=bash)"\n'
    for line, place in lines:  # by the function that bash has for the command
        script += f"rule=$(complete -p {line.split()[0]}); rule=${{rule% *}}; COMPREPLY=()\n"
        script += f"COMP_LINE='{line}' COMP_CWORD={place}; ${{rule##* }}; echo ${{COMPREPLY[@]}}\n"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    photos = "dataset=image_folder dataset=imagenet"
    assert done.stdout.splitlines() == [photos, "method=ours", photos, ""]
    assert not Path("other_ran").exists(), "the tab key runs no other program"


def test_a_file_that_breaks_completion_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "broken.yaml").write_text("name: [")
    line = f"run.py --config-dir {tmp_path} method=broken bi"
    done = command("-sc", "query=bash", stand_in=False, COMP_LINE=line, COMP_POINT=str(len(line)), COMP_CWORD="4")
    assert done.returncode == 1
    assert re.fullmatch(r"error: --shell-completion: .*broken\.yaml.*\n", done.stderr)


def test_the_traceback_is_there_for_who_asks() -> None:
    done = command("bits=9", stand_in=False, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_sweep_expands_as_hydra_does() -> None:
    jobs = cli.preflight(["-m", "method=bayesq,gptq", "bits=3,3.5,4"])
    assert jobs is not None
    assert [(job.config["method"]["name"], job.config["bits"]) for job in jobs] == list(
        itertools.product(["bayesq", "gptq"], [3, 3.5, 4])
    )
    assert len({job.run_id for job in jobs}) == 6
    assert jobs[0].overrides == ("method=bayesq", "bits=3")


@pytest.mark.parametrize(
    "overrides",
    [
        ["bits=3", "seed=1"],
        ["bits=3", "seed=2", "bits=5"],
        ["ablation=gptq", "bits=3"],
        ["ablation=examples_64", "calibration.examples=32", "calibration={batch_size: 8}"],
        [
            "model=resnet",
            "dataset=digits",
            "method=gptq",
            "allocator=knapsack",
            "allocation.widths=[2,4]",
            "layers.exclude=['*fc']",
        ],
        ["+experiment=glue", "dataset.task=rte", "model.checkpoint=x"],
        ["+allocation.pinned={a:8}", "bits=3", "++bits=4"],
        ["results_dir=here", "hydra.sweep.dir=there", "bits=4"],
    ],
    ids=" ".join,
)
def test_a_job_is_composed_from_what_others_read_as_it_would_be_alone(overrides: list[str]) -> None:
    flight = composition.Preflight()
    for others in (["bits=7"], ["seed=9", "ablation=gptq"], ["model=resnet", "dataset=digits", "method=gptq"]):
        flight.check(others)
    alone = composition.Preflight().compose(list(map(composition.for_hydra, overrides)))
    for _ in range(2):
        job = flight.check(overrides)
        assert job.config == config.resolved(alone)
        assert (job.run_id, job.run_dir) == (config.run_id(alone), config.run_dir(alone))


def test_a_users_file_that_has_the_name_of_one_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    composition.Preflight(config_dir=str(tmp_path))
    (tmp_path / "method/rtn.yaml").write_text("name: rtn\n")
    with pytest.raises(UserError, match=r"^--config-dir .*: method/rtn\.yaml would be ignored, .*: rename it"):
        composition.Preflight(config_dir=str(tmp_path))
    composition.Preflight(config_dir=str(composition.conf_dir()))


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ("bits=3", "++bits=3"),
        ("+bits=3", "++bits=3"),
        ("++bits=3,4", "++bits=3,4"),
        ("method=gptq", "method=gptq"),
        ("+experiment=glue", "experiment=glue"),
        ("~bits", "~bits"),
        ("bits", "bits"),
        ("hydra/launcher=joblib", "hydra/launcher=joblib"),
        ("hydra.sweep.dir=x", "hydra.sweep.dir=x"),
        ("+hydra.launcher.x=1", "+hydra.launcher.x=1"),
    ],
)
def test_what_hydra_gets_for_what_is_typed(typed: str, given: str) -> None:
    assert composition.for_hydra(typed) == given


def test_a_key_that_only_some_of_several_choices_have_needs_no_sign() -> None:
    jobs = cli.preflight(["-m", "method=gptq,rtn", "method.clip=mse"]) or []
    assert [(job.config["method"]["name"], job.config["method"]["clip"]) for job in jobs] == [
        ("gptq", "mse"),
        ("rtn", "mse"),
    ]
    assert jobs[0].overrides == ("method=gptq", "method.clip=mse")
    done = command("-m", "method=gptq,rtn", "method.clip=mse")
    assert (done.returncode, runs()) == (0, ["gptq 4 0", "rtn 4 0"])


def test_jobs_with_the_same_result_count_once() -> None:
    jobs = cli.preflight(["-m", "method=gptq", "bits=3,3.0", "posterior=diag,kfac"])
    assert jobs is not None
    assert len(jobs) == 1


def test_every_choice_on_every_axis_composes() -> None:
    text = cli.preflight(["-m", "method=glob(*)", "posterior=glob(*)"])
    images = cli.preflight(["-m", "model=resnet", "dataset=digits", "method=glob(*)"])
    for jobs in (text, images):
        assert jobs is not None
        assert {job.config["method"]["name"] for job in jobs} >= {"rtn", "gptq", "awq", "bayesq"}


def test_questions_are_left_to_hydra() -> None:
    for question in (["--help"], ["--cfg", "job"], ["--info"], ["--hydra-help"], ["-sc", "install=bash"]):
        assert cli.preflight(question) is None


def test_an_experiment_may_choose_and_set_but_not_invent() -> None:
    folder = Path("mine/experiment")
    folder.mkdir(parents=True)
    header = "# @package _global_\ndefaults: [{override /method: gptq}]\n"
    (folder / "good.yaml").write_text(f"{header}bits: 3\n")
    (folder / "bad.yaml").write_text(f"{header}bitz: 3\n")
    jobs = cli.preflight(["--config-dir", "mine", "+experiment=good"])
    assert jobs is not None
    assert (jobs[0].config["method"]["name"], jobs[0].config["bits"]) == ("gptq", 3)
    with pytest.raises(UserError, match=r"^unknown key 'bitz'"):
        cli.preflight(["--config-dir", "mine", "+experiment=bad"])
    (Path("mine/preset")).mkdir()
    Path("mine/preset/five.yaml").write_text("# @package _global_\nbits: 5\n")
    (job,) = cli.preflight(["--config-dir", "mine", "+preset=five"]) or []
    assert job.config["bits"] == 5
    with pytest.raises(UserError, match=r"^experiment=goood: choose one of bad, .*good.*; did you mean 'good'\?"):
        cli.preflight(["--config-dir", "mine", "+experiment=goood"])


def test_a_foreign_sweeper_decides_for_itself_what_it_sweeps() -> None:
    foreign = "hydra.sweeper._target_=my.Sweeper"
    assert cli.preflight(["-m", foreign, "bits=interval(2,8)"]) == []
    with pytest.raises(UserError, match=r"^seed=-1"):
        cli.preflight(["-m", foreign, "bits=interval(2,8)", "seed=-1"])


def test_a_job_for_other_machines_is_not_checked_against_the_devices_of_this_one() -> None:
    # a class of its own stands for a launcher that sends jobs away
    jobs = cli.preflight(["-m", "device=cuda:99", "hydra.launcher._target_=my.ClusterLauncher"])
    assert jobs is not None
    assert len(jobs) == 1


CONSTRUCTORS = [
    (["method=gptq", "method.clip=foo"], "method.clip=foo"),
    (["method=gptq", "method.group_size=0"], "method.group_size=0"),
    (["method=rtn", "method.clip=curvature"], "method.clip=curvature"),
    (["method=awq", "method.clip_lowest=7"], "clip_lowest"),
    (["method.states=7"], "method.states=7"),
    (["method.damping=much"], "method.damping=much: needs a number"),
    (["method.damping=null"], "method.damping=null: needs a number"),
    (["method=gptq", "method.act_order=1"], "method.act_order=1: needs true or false"),
    (["posterior.examples=all"], "posterior.examples=all: needs a whole number or null"),
    (["model=resnet", "dataset=digits", "model.depths=3"], "model.depths=3"),
    (["+experiment=rn50_imagenet"], "needs either dataset.root=DIR or dataset.hub=REPOSITORY"),
    (["allocation.block=column"], "allocation.block=column"),
    (["allocation.block=group", "allocation.row_multiple=3"], "allocation.row_multiple=3"),
    (["distill=true", "distillation.steps=-1"], "distillation.steps=-1: needs a whole number of at least 0"),
    (["distill=true", "distillation.evaluations=0"], "distillation.evaluations=0"),
    (["distill=true", "distillation.held_out=1.5"], "distillation.held_out=1.5: needs a share"),
    (["posterior.likelihood=poisson"], "posterior.likelihood=poisson"),
    (["posterior=lowrank", "posterior.rank=0"], "posterior.rank=0"),
    (["method=gptq", "allocator=knapsack", "posterior.num_data=0"], "posterior.num_data=0"),
    (["model=resnet", "dataset=digits", "model.image_size=0"], "model.image_size=0"),
    (["model=resnet", "dataset=digits", "model.channels=[15,16,16,16]"], "model.channels=[15"),
    (["model=cifar_resnet20", "dataset=cifar10", "model.depth=21"], "model.depth=21"),
    (["model=cifar_resnet20", "dataset=cifar10", "dataset.subset=some"], "dataset.subset=some"),
    (["dataset=glue", "dataset.task=sst3"], "dataset.task=sst3"),
    (["method._target_=baselines.rtn.NoSuchClass"], "NoSuchClass"),
    (["model._target_=no_such_package.Net"], "no_such_package"),
    (["posterior._target_=bayesq.posterior.LayerPosterior"], "method=bayesq posterior=kfac cannot be made"),
]


@pytest.mark.parametrize(("arguments", "named"), CONSTRUCTORS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_only_a_constructor_refuses_is_refused_before_the_first_run(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["model.checkpoint=x", "dataset.root=y"] if "dataset=cifar10" in arguments else []
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", "seed=0,1", *arguments, *files])
    monkeypatch.setitem(sys.modules, "bayesq.suite.runner", None)  # importing it now raises
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert not list(Path().glob("*/*/*")), "no run has begun"


def test_what_is_finished_is_not_constructed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value may have been allowed when it ran; nothing of it is needed any more."""
    monkeypatch.setattr(sys, "argv", ["run.py"])
    (job,) = cli.preflight(["method=gptq", "method.clip=foo"]) or []
    results.write_json(job.run_dir / "result.json", {**finished(job), "status": "finished"})
    assert cli._run([job]) == 0


@pytest.mark.parametrize(
    "line",
    [
        "-m bits=3,4 seed=1",
        "bits=3,4 -m seed=1",
        "bits=3,4 seed=1 --multirun",
        "bits=3,4 -cn config seed=1 -m",
        "-m bits=3,4 --config-name config seed=1",
    ],
)
def test_options_may_stand_between_overrides(line: str) -> None:
    jobs = cli.preflight(line.split())
    assert jobs is not None
    assert [job.overrides for job in jobs] == [("bits=3", "seed=1"), ("bits=4", "seed=1")]


def test_the_version_is_that_of_bayesq(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.preflight(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, f"bayesq {bayesq.__version__}\n")


@pytest.mark.parametrize(
    "override", ["bits=range(3,5)", "method=glob(g*)", "seed=choice(1,2)", "+allocation.pinned={a:8}"]
)
def test_without_assertions_functions_are_refused_and_lists_work(override: str) -> None:
    """PYTHONOPTIMIZE: Hydra's parser moves on within its assertions."""
    done = command("-m", "method=rtn", override, PYTHONOPTIMIZE="1")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot read '{override}'") and done.stderr.count("\n") == 1
    assert "PYTHONOPTIMIZE" in done.stderr
    if override.startswith("bits"):
        assert command("-m", "method=rtn", "bits=3,4", PYTHONOPTIMIZE="1").returncode == 0
        assert runs() == ["rtn 3 0", "rtn 4 0"]


# --------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("kind", ["disabled", "none", "stdout"])
def test_logging_may_be_chosen_as_hydra_offers(kind: str) -> None:
    own = () if kind == "stdout" else (f"hydra/hydra_logging={kind}",)
    sweep = ("-m", "method=rtn", "bits=3,4", f"hydra/job_logging={kind}", *own)
    done = command(*sweep)
    assert (done.returncode, done.stderr, runs()) == (0, "", ["rtn 3 0", "rtn 4 0"])
    again = command(*sweep)
    assert again.returncode == 0 and len(runs()) == 2
    assert again.stdout.count("skipped") == 2, "Hydra, which logs as it was told, is not asked"


WITHOUT_RUNS = """
import atexit, sys
heavy = ("torch", "numba", "wandb", "pandas", "scipy", "sklearn", "timm", "transformers", "torchvision")
atexit.register(lambda: print("imported:", [name for name in heavy if name in sys.modules], file=sys.stderr))
from bayesq.suite import cli
def refuse(*_, **__):
    raise AssertionError("Hydra is not needed")
cli._run_hydra = refuse
cli.main()
"""


def test_a_finished_sweep_asks_neither_hydra_nor_the_numerical_libraries() -> None:
    sweep = ["-m", "method=gptq,rtn", "bits=3,3.5,4", "seed=range(4)"]
    for job in cli.preflight(sweep) or []:
        results.write_json(job.run_dir / "result.json", {**finished(job), "status": "finished"})
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RUNS, *sweep],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "imported: []\n")
    assert done.stdout.count("skipped (finished): ") == 24
    assert "[24 of 24]" in done.stdout
    assert "minilm on movie_snippets" in done.stdout


def test_every_run_of_a_sweep_says_its_place_and_what_is_left() -> None:
    done = command("-m", "method=rtn", "bits=3,4,5", "seed=0")
    lines = [line for line in done.stdout.splitlines() if line.startswith("run ")]
    names = "model=minilm dataset=movie_snippets method=rtn"
    assert lines[0] == f"run 1 of 3: {names} bits=3 seed=0"
    for k, line in enumerate(lines[1:], 2):
        assert re.fullmatch(rf"run {k} of 3: {names} bits={k + 2} seed=0, about \d+ s left", line)
    assert "run " not in command("method=rtn", "bits=6").stdout.replace("run.", "")


def test_a_sweep_runs_every_job_then_skips_then_is_forced() -> None:
    sweep = ("-m", "method=gptq,rtn", "bits=3,3.5", "results_dir=out")
    first = command(*sweep)
    assert (first.returncode, first.stderr) == (0, "")
    assert runs() == ["gptq 3 0", "gptq 3.5 0", "rtn 3 0", "rtn 3.5 0"]
    assert len(load_results(Path("out"))) == 4
    table = first.stdout[first.stdout.index("minilm on movie_snippets: full precision 75.00 %") :]
    assert [line.split()[:4] for line in table.splitlines()[3:]] == [
        ["gptq", "3", "50.00", "-25.00"],
        ["gptq", "3.5", "50.00", "-25.00"],
        ["rtn", "3", "50.00", "-25.00"],
        ["rtn", "3.5", "50.00", "-25.00"],
    ]
    again = command(*sweep)
    assert again.returncode == 0
    assert again.stdout.count("skipped (finished): ") == 4
    assert again.stdout.endswith(table)
    assert len(runs()) == 4
    assert command(*sweep, "force=true").returncode == 0
    assert len(runs()) == 8
    # nothing is left where the command was started but what it was asked for
    assert {path.name for path in Path().iterdir()} == {"out", "ran.txt"}


def test_each_run_of_a_command_gets_what_the_one_before_has_left() -> None:
    assert command("-m", "method=rtn", "bits=3", "seed=0,1,2", INHERITED="1").returncode == 0
    assert Path("inherited.txt").read_text().splitlines() == ["None", "of seed 0", "of seed 1"]


def test_a_single_run_has_its_log_and_config_beside_its_result() -> None:
    done = command("bits=3", "method=rtn")
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = (path for path in Path("results").iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} >= {"result.json", "run.log", ".hydra"}
    assert results.finished_result(folder) is not None


def test_one_failing_job_stops_no_other_and_is_reported_once() -> None:
    sweep = ("-m", "method=gptq", "bits=3", "seed=13,14,0")
    done = command(*sweep)
    assert done.returncode == 1
    mistake, defect = done.stderr.splitlines()
    assert mistake.startswith("error: model.checkpoint=x: there is no such file [")
    assert mistake.endswith(": method=gptq bits=3 seed=13]")
    assert defect.startswith("error: ZeroDivisionError: second line [")
    assert re.search(r": method=gptq bits=3 seed=14; \S+/traceback\.txt\]$", defect)
    assert runs() == ["gptq 3 0"]
    assert "failed: " in done.stdout
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("gptq"))
    assert row.split()[2:4] == ["1/3", "50.00"], "the mean is of the one run that finished"
    statuses = {path.parent.name: json.loads(path.read_text()) for path in Path("results").glob("*/status.json")}
    assert sorted(statuses.values(), key=lambda status: status["overrides"]) == [
        {
            "status": "failed",
            "error": "model.checkpoint=x: there is no such file",
            "overrides": ["method=gptq", "bits=3", "seed=13"],
            "traceback": None,
        },
        {
            "status": "failed",
            "error": "ZeroDivisionError: second line",
            "overrides": ["method=gptq", "bits=3", "seed=14"],
            "traceback": "traceback.txt",
        },
    ]
    (traceback,) = Path("results").glob("*/traceback.txt")
    assert "ZeroDivisionError" in traceback.read_text()

    repaired = command(*sweep, REPAIRED="1")
    assert (repaired.returncode, repaired.stderr) == (0, "")
    assert runs() == ["gptq 3 0", "gptq 3 13", "gptq 3 14"]
    assert not list(Path("results").glob("*/status.json"))
    assert not list(Path("results").glob("*/traceback.txt"))


def test_one_failing_job_of_a_parallel_launcher_is_reported_as_one_of_the_basic_one() -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = command("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "method=rtn", "seed=14,0")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [done.stderr.splitlines()[-1]]
    assert "failed: " in done.stdout


def test_a_failure_that_cannot_be_written_down_is_still_reported_and_stops_no_other_job() -> None:
    done = command("-m", "method=rtn", "seed=16,0")
    assert done.returncode == 1
    assert "error: results_dir=results: run.log cannot be written (No space left on device)" in done.stderr
    assert "the reason cannot be written there" in done.stderr
    assert runs() == ["rtn 4 0"]
    assert "missing: " in done.stdout


def test_a_killed_run_is_missing_and_only_what_is_missing_runs_again() -> None:
    done = command("-m", "method=rtn", "seed=0,15,1")
    assert done.returncode == -signal.SIGKILL
    assert runs() == ["rtn 4 0"]
    again = command("-m", "method=rtn", "seed=0,1")
    assert again.returncode == 0
    assert runs() == ["rtn 4 0", "rtn 4 1"]
    jobs = cli.preflight(["-m", "method=rtn", "seed=0,15"])
    assert jobs is not None
    assert not cli.summarise(jobs)


def test_what_a_killed_run_left_half_written_goes_with_the_next_attempt() -> None:
    (job,) = cli.preflight(["method=rtn"]) or ()
    with pytest.raises(RuntimeError), results.atomic_path(job.run_dir / "layers.csv") as temporary:
        temporary.write_text("half")
        os.link(temporary, temporary.with_name(temporary.name.replace("layers", "predictions")))
        raise RuntimeError
    assert len(list(job.run_dir.iterdir())) == 1
    assert command("method=rtn").returncode == 0
    assert not list(job.run_dir.glob(".*.tmp"))


def test_a_run_that_another_process_works_on_is_waited_for_and_then_skipped() -> None:
    (job,) = cli.preflight(["method=rtn"]) or ()
    with lock(job.run_dir / "result.json"):
        waiting = start("method=rtn")
        assert waiting.stdout is not None
        line = waiting.stdout.readline()
        assert line == f"waiting for another process, which holds {job.run_dir / 'result.json'}.lock\n"
        time.sleep(1)
        assert waiting.poll() is None
        results.write_json(job.run_dir / "result.json", {"status": "finished", **finished(job)})
    out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert "waiting" not in out, "said once"
    assert out.startswith(f"skipped (finished): {job.run_id}")
    assert runs() == []


def test_a_forced_run_that_fails_leaves_no_result_that_looks_new() -> None:
    assert command("seed=14", "method=rtn", REPAIRED="1").returncode == 0
    done = command("seed=14", "method=rtn", "force=true")
    assert done.returncode == 1
    assert load_results(Path("results")) == []
    assert " failed " in done.stdout


def test_a_truncated_result_is_run_again() -> None:
    assert command("method=rtn").returncode == 0
    (result,) = Path("results").glob("*/result.json")
    result.write_text(result.read_text()[:40])
    assert command("method=rtn").returncode == 0
    assert len(runs()) == 2
    assert results.read_result(result) is not None


def test_relative_folders_are_relative_to_where_the_command_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert command("method=rtn", "results_dir=../b/c").returncode == 0
    assert len(load_results(tmp_path / "b" / "c")) == 1
    assert not (tmp_path / "a" / "results").exists()


def test_help_explains_the_axes_with_examples_that_compose() -> None:
    done = command("--help", stand_in=False)
    assert done.returncode == 0
    for axis in ("model", "dataset", "method", "posterior", "bits", "allocator"):
        assert axis in done.stdout
    examples = [line.split("  ")[1] for line in done.stdout.splitlines() if line.startswith("  python run.py")]
    assert len(examples) >= 4
    for example in examples:
        assert cli.preflight(example.split()[2:]), example


def test_the_config_can_be_shown() -> None:
    done = command("--cfg", "job", "--resolve", "method=gptq", stand_in=False)
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["allocator"] == "uniform"

"""`analysis.bounds`: one group of runs that cannot be judged does not stop the others."""

from types import SimpleNamespace

import pytest
from result_files import add_run

from analysis import bounds
from bayesq.errors import Refused
from bayesq.pipeline import refuse_unseen


def test_layers_that_no_example_reaches_are_refused():
    with pytest.raises(Refused, match=r"no calibration example reaches stem: add them to layers\.exclude"):
        refuse_unseen(SimpleNamespace(unseen={"stem"}))


def test_a_group_that_is_refused_is_named_and_the_others_are_written(tmp_path, monkeypatch):
    for model in ("resnet", "minilm"):
        add_run(tmp_path, model=model)
    for file in tmp_path.glob("*/bounds.csv"):
        file.unlink()

    class Judge:
        def rows(self, folder):
            return [{"name": "stem", "risk": 1.0}]

        @classmethod
        def of(cls, cfg):
            if cfg.model.name == "resnet":
                raise Refused("layer stem: its weights are not finite")
            return cls()

    monkeypatch.setattr(bounds, "Judge", Judge)
    monkeypatch.setattr(bounds, "recorded_config", lambda result: result["config"])
    (left,) = bounds.write_bounds(tmp_path)
    assert left.endswith(": layer stem: its weights are not finite")
    assert len(list(tmp_path.glob("*/bounds.csv"))) == 1

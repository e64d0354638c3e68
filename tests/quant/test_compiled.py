"""Compiled functions: kept for the next process where a folder can be written, compiled anew where none can."""

import numba
import pytest

from bayesq.quant.compiled import compiled


def plus_one(x: float) -> float:
    return x + 1


def test_machine_code_is_kept():
    function = compiled()(plus_one)
    assert function(1.0) == 2.0 and function.stats.cache_path


def test_no_folder_to_write_to_is_no_reason_to_fail(monkeypatch):
    njit = numba.njit

    def refusing(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refusing)
    function = compiled(error_model="numpy")(lambda x: 1 / x)
    assert function(0.0) == float("inf") and not function.stats.cache_path


def test_options_reach_numba():
    with pytest.raises(ZeroDivisionError):
        compiled()(lambda x: 1 / x)(0.0)

"""Whatever keeps files from coming from the hub is one line of one form."""

import logging
import re
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from bayesq.suite.errors import UserError
from bayesq.suite.hub import from_hub, hub_file, reachable, tell_commit


def caused(error: Exception) -> OSError:
    """As transformers raises it: an error of its own with the hub's as the cause."""
    try:
        raise OSError("We could not load this.\nSee the documentation") from error
    except OSError as wrapped:
        return wrapped


def answer(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # the real ones want a response
    Exception.__init__(error, "404 Client Error. (Request ID: 1)")
    return error


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (errors.GatedRepoError, "it is gated: accept its terms on the hub and log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "there is no such repository, or none that you may read"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.RemoteEntryNotFoundError, "it does not hold that file"),
    ],
)
def test_what_the_hub_refuses_is_said_alike_through_every_library(kind, reason, wrapped):
    error = caused(answer(kind)) if wrapped else answer(kind)

    def load():
        raise error

    with pytest.raises(UserError) as caught:
        from_hub("model.name=a/b", "give model.checkpoint=DIR", load)
    assert str(caught.value) == f"model.name=a/b could not be read from the hub ({reason}): give model.checkpoint=DIR"


@pytest.mark.parametrize(
    ("offline", "reason"), [(True, "HF_HUB_OFFLINE is set"), (False, "it cannot be reached: no route")]
)
def test_a_hub_out_of_reach_is_not_asked(offline, reason, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr("huggingface_hub.get_session", Mock(side_effect=OSError("no\nroute")))
    assert not reachable()
    said = (
        rf"^model=x could not be read from the hub \({re.escape(reason)}, and the files are not in its cache here\): y"
    )
    with pytest.raises(UserError, match=said):
        hub_file("a/absent", "weights", None, "model=x", "y")


def test_what_the_cache_lacks_without_a_hub():
    def load():
        raise OSError("a long story")

    with pytest.raises(UserError, match=r"^model=x could .*HF_HUB_OFFLINE is set, and the files are not in its cache"):
        from_hub("model=x", "y", load, online=False)
    assert from_hub("model=x", "y", lambda: 3, online=False) == 3


@pytest.mark.parametrize(
    ("asked", "commit", "said"),
    [
        (None, "a" * 40, f"at commit {'a' * 40} of main; model.revision={'a' * 40} stays with it"),
        ("v1", "b" * 40, f"at commit {'b' * 40} of v1; model.revision={'b' * 40} stays with it"),
        ("c" * 40, "c" * 40, ""),
        (None, "main", ""),
    ],
)
def test_a_commit_that_is_not_pinned_is_told(asked, commit, said, caplog):
    with caplog.at_level(logging.INFO, "bayesq"):
        tell_commit("model=x", asked, commit, "model.revision")
    assert (said in caplog.text) if said else not caplog.text

"""Classes that a YAML file names: what the error says if they cannot be imported."""

from pathlib import Path

import pytest

from bayesq.defaults import construct
from bayesq.errors import Refused


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("my_methods_9.Method", r"no module 'my_methods_9': add the folder that holds it to PYTHONPATH"),
        ("strange_package.sub.gone.Method", r"no module 'strange_package.sub': add the folder"),
        ("strange_package.needy.Method", r"strange_package.needy imports not_there_9, which is not installed"),
        ("strange_package.Method", r"module strange_package has no Method"),
        ("strange_package.other.Method", r"strange_package.other cannot be imported \(cannot import name 'Gone' from"),
        ("strange_package.value.Method", r"strange_package.value cannot be imported \(invalid literal"),
        ("Method", r"it needs package.module.Class"),
    ],
)
def test_a_class_that_cannot_be_imported(
    target: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "strange_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "needy.py").write_text("import not_there_9\n")
    (package / "other.py").write_text("from pathlib import Gone\n")
    (package / "value.py").write_text("int('one')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Refused, match=rf"^_target_={target}: .*{line}"):
        construct({"_target_": target})

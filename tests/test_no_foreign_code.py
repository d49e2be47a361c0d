"""Nothing that comes with a checkpoint is run."""

import ast
from pathlib import Path

import pytest

from tests.test_imports import SOURCES, imported

UNPICKLES = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_pickles_and_no_remote_code(path: Path) -> None:
    assert not UNPICKLES & {name.partition(".")[0] for name in imported(path)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in {"torch.load", "eval", "exec"}, f"{path}:{node.lineno}"
        assert given.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
        assert given.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"
        if called.endswith(".from_pretrained"):  # by default, transformers asks at a terminal
            assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"

"""A llama.cpp that is missing, too old, or laid out differently is refused with a way out."""

import importlib.metadata

import pytest

from mode_gguf.errors import MissingResourceError
from mode_gguf.llama_cpp import c_api


def test_this_library_is_accepted() -> None:
    c_api.library()
    assert c_api.library_build() >= c_api.OLDEST_BUILD
    assert f"b{c_api.library_build()}" in c_api.library_version()


def test_other_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(c_api.ContextParams.defaults, "n_seq_max", 7)
    with pytest.raises(MissingResourceError, match=r"llama_context_params differently \(at n_seq_max\).*pip install"):
        c_api.library.__wrapped__()


@pytest.mark.parametrize(
    ("version", "message"),
    [("2026.1.9000", "build 9000, .* needs"), ("1.0", "names no llama.cpp build"), (None, "is missing; install")],
)
def test_unusable_packages(monkeypatch: pytest.MonkeyPatch, version: str | None, message: str) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(MissingResourceError, match=message):
        c_api.library.__wrapped__()

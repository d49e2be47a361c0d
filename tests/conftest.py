"""Fixtures every test folder shares."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hub_server import Hub, serving
from tests.pico import write_pico_qwen3vlmoe
from tests.pico_gemma4_moe import write_pico_gemma4_moe
from tests.pico_glm4v_moe import write_pico_glm4v_moe
from tests.pico_internvl import write_pico_internvl
from tests.pico_kimi import write_pico_kimi
from tests.pico_mistral4 import write_pico_mistral4
from tests.pico_qwen3_5_moe import write_pico_qwen3_5_moe


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Qwen3-VL-MoE checkpoint in the public layout; read only."""
    return write_pico_qwen3vlmoe(tmp_path_factory.mktemp("pico") / "pico-qwen3-vl-moe")


@pytest.fixture(scope="session")
def pico_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in the module layout, as transformers 5 would save them again; read only."""
    return write_pico_qwen3vlmoe(tmp_path_factory.mktemp("pico") / "pico-module", layout="module")


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the hub that huggingface_hub talks to here; the cache is empty, and nobody is logged in."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    home = tmp_path_factory.mktemp("hub")
    with warnings.catch_warnings(), serving() as hub:
        # It sends files to its own HTTP client in a way that the client advises against.
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        # It waits between tries, up to half a minute in all.
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield hub
        _http.close_session()


@pytest.fixture(scope="session")
def pico_qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Qwen3.5-MoE checkpoint in the public layout, with an `mtp.*` tensor; read only."""
    return write_pico_qwen3_5_moe(tmp_path_factory.mktemp("pico") / "pico-qwen3-5-moe", mtp=True)


@pytest.fixture(scope="session")
def pico_qwen3_5_resaved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in tensors of their own per expert, as transformers 5 saves them; read only."""
    return write_pico_qwen3_5_moe(tmp_path_factory.mktemp("pico") / "pico-resaved", layout="resaved")


@pytest.fixture(scope="session")
def pico_glm4v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico GLM-4.5V checkpoint in the public layout, with a block for multi-token prediction; read only."""
    return write_pico_glm4v_moe(tmp_path_factory.mktemp("pico") / "pico-glm-4-5v", mtp=True)


@pytest.fixture(scope="session")
def pico_glm4v_fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with fused experts, as transformers 5 holds them, without that block; read only."""
    return write_pico_glm4v_moe(tmp_path_factory.mktemp("pico") / "pico-glm-fused", layout="fused")


@pytest.fixture(scope="session")
def pico_gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Gemma 4 MoE checkpoint with a tensor of an audio tower; read only."""
    return write_pico_gemma4_moe(tmp_path_factory.mktemp("pico") / "pico-gemma-4", audio=True)


@pytest.fixture(scope="session")
def pico_internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico InternVL3.5-MoE checkpoint in its authors' layout; read only."""
    return write_pico_internvl(tmp_path_factory.mktemp("pico") / "pico-internvl")


@pytest.fixture(scope="session")
def pico_internvl_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in transformers' layout, which transformers itself can open; read only."""
    return write_pico_internvl(tmp_path_factory.mktemp("pico") / "pico-internvl-hf", layout="transformers")


@pytest.fixture(scope="session")
def pico_mistral4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Mistral Small 4 checkpoint, named as transformers saves it; read only."""
    return write_pico_mistral4(tmp_path_factory.mktemp("pico") / "pico-mistral4")


@pytest.fixture(scope="session")
def pico_mistral4_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under the names of transformers' parameters; read only."""
    return write_pico_mistral4(tmp_path_factory.mktemp("pico") / "pico-mistral4-module", layout="module")


@pytest.fixture(scope="session")
def pico_kimi_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Kimi-VL checkpoint; read only."""
    return write_pico_kimi(tmp_path_factory.mktemp("pico") / "pico-kimi-vl", "kimi_vl")


@pytest.fixture(scope="session")
def pico_kimi_vl_as_k25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights and settings with Kimi K2.5's names, which transformers can read; read only."""
    folder = tmp_path_factory.mktemp("pico") / "pico-kimi-vl-as-k25"
    return write_pico_kimi(folder, "kimi_k25", low_rank=False, yarn=False)


@pytest.fixture(scope="session")
def pico_kimi_k25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Kimi K2.5 checkpoint in full precision; read only."""
    return write_pico_kimi(tmp_path_factory.mktemp("pico") / "pico-kimi-k25", "kimi_k25")


@pytest.fixture(scope="session")
def pico_kimi_k25_packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its experts in four bits, as published; read only."""
    return write_pico_kimi(tmp_path_factory.mktemp("pico") / "pico-kimi-k25-packed", "kimi_k25_packed")

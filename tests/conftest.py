"""Fixtures every test folder shares."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.families.pico.gemma4_moe import write_pico_gemma4_moe
from tests.families.pico.glm4v_moe import write_pico_glm4v_moe
from tests.families.pico.internvl import write_pico_internvl
from tests.families.pico.kimi import write_pico_kimi
from tests.families.pico.mistral4 import write_pico_mistral4
from tests.families.pico.qwen3_5_moe import write_pico_qwen3_5_moe
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe
from tests.hub_server import Hub, serving
from tests.validation.conftest import folder, full, held_out_folder, picture, settings, small

__all__ = ["folder", "full", "held_out_folder", "picture", "settings", "small"]


def checkpoint(name: str, write: Callable[..., Path], *arguments: Any, **options: Any) -> Any:
    """A fixture: the folder of a pico checkpoint, written once and read only."""

    @pytest.fixture(scope="session")
    def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("pico") / name, *arguments, **options)

    return written


pico = checkpoint("pico-qwen3-vl-moe", write_pico_qwen3vlmoe)
pico_module = checkpoint("pico-module", write_pico_qwen3vlmoe, layout="module")
pico_qwen3_5 = checkpoint("pico-qwen3-5-moe", write_pico_qwen3_5_moe, mtp=True)
pico_qwen3_5_resaved = checkpoint("pico-resaved", write_pico_qwen3_5_moe, layout="resaved")
pico_glm4v = checkpoint("pico-glm-4-5v", write_pico_glm4v_moe, mtp=True)
pico_glm4v_fused = checkpoint("pico-glm-fused", write_pico_glm4v_moe, layout="fused")
pico_gemma4 = checkpoint("pico-gemma-4", write_pico_gemma4_moe, audio=True)
pico_internvl = checkpoint("pico-internvl", write_pico_internvl)
pico_internvl_hf = checkpoint("pico-internvl-hf", write_pico_internvl, layout="transformers")
pico_mistral4 = checkpoint("pico-mistral4", write_pico_mistral4)
pico_mistral4_module = checkpoint("pico-mistral4-module", write_pico_mistral4, layout="module")
pico_kimi_vl = checkpoint("pico-kimi-vl", write_pico_kimi, "kimi_vl")
pico_kimi_k25 = checkpoint("pico-kimi-k25", write_pico_kimi, "kimi_k25")
pico_kimi_k25_packed = checkpoint("pico-kimi-k25-packed", write_pico_kimi, "kimi_k25_packed")
pico_kimi_vl_as_k25 = checkpoint("pico-kimi-vl-as-k25", write_pico_kimi, "kimi_vl_as_k25")
"""Kimi-VL's weights and settings with Kimi K2.5's names, which transformers can read."""


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

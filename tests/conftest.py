"""Fixtures every test folder shares."""

from pathlib import Path

import pytest

from tests.pico import write_pico_qwen3vlmoe
from tests.pico_qwen3_5_moe import write_pico_qwen3_5_moe


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Qwen3-VL-MoE checkpoint in the public layout; read only."""
    return write_pico_qwen3vlmoe(tmp_path_factory.mktemp("pico") / "pico-qwen3-vl-moe")


@pytest.fixture(scope="session")
def pico_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in the module layout, as transformers 5 would save them again; read only."""
    return write_pico_qwen3vlmoe(tmp_path_factory.mktemp("pico") / "pico-module", layout="module")


@pytest.fixture(scope="session")
def pico_qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Qwen3.5-MoE checkpoint in the public layout, with an `mtp.*` tensor; read only."""
    return write_pico_qwen3_5_moe(tmp_path_factory.mktemp("pico") / "pico-qwen3-5-moe", mtp=True)


@pytest.fixture(scope="session")
def pico_qwen3_5_resaved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in tensors of their own per expert, as transformers 5 saves them; read only."""
    return write_pico_qwen3_5_moe(tmp_path_factory.mktemp("pico") / "pico-resaved", layout="resaved")

"""Bases that hold a family's checkpoint in llama.cpp's form, beside it and beside a fine-tune of it."""

import re
from pathlib import Path

import numpy as np
import pytest

from mode_gguf.architectures import checkpoint_with_base
from mode_gguf.checkpoint.folder import Checkpoint, Index
from mode_gguf.errors import InputError
from tests.base_gguf import open_base, write_family_base
from tests.families.cases import every_layout
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase

NOT_IN_BOTH = re.compile(r"mtp\.|audio|pos_emb|position_emb|router\.(per_expert_)?scale|layer_scalar")
"""What a base does not have, has resized, or calls as gguf's tables do not know."""


@every_layout
def test_the_own_base_is_accepted_and_that_of_a_fine_tune_refused(
    case: FamilyCase, layout: str, families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = families.checkpoint(layout)
    for quant_type in ("F16", "BF16"):
        base = open_base(*write_family_base(checkpoint, tmp_path, quant_type))
        assert checkpoint_with_base(checkpoint, base).base is not None

    original, tuned = Checkpoint.read, ""

    def read(opened: Checkpoint, name: str, index: Index | None = None) -> np.ndarray:
        stored = original(opened, name, index)
        if name != tuned:
            return stored
        return stored ^ np.uint16(4) if stored.dtype == np.uint16 else (stored * 1.02).astype(stored.dtype)

    monkeypatch.setattr(Checkpoint, "read", read)
    missed = []
    for tuned in _one_of_a_kind(checkpoint):
        try:
            checkpoint_with_base(checkpoint, base, measured=False)
            missed.append(tuned)
        except InputError:
            continue
    assert missed == []


def _one_of_a_kind(checkpoint: Checkpoint) -> list[str]:
    """Names of tensors that differ in more than numbers, but for blocks beyond the last layer."""
    layers = int(checkpoint.config.get("text_config", checkpoint.config).get("num_hidden_layers", 0))
    kinds = {}
    for name in checkpoint.tensors:
        layer = re.search(r"(?<!encoder\.)(?<!transformer\.)layers\.(\d+)\.", name)
        if not NOT_IN_BOTH.search(name) and (layer is None or not layers or int(layer[1]) < layers):
            kinds[re.sub(r"\d+", "N", name)] = name
    return list(kinds.values())

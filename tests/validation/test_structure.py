"""The structure check tells what differs from the plan, and `describe` what a file is."""

import json
import struct
from pathlib import Path

import pytest

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.validation.structure import check_structure, describe
from tests.validation.conftest import Files


def test_planned_files_pass(small: Files) -> None:
    header = check_structure(small.text, small.types)
    assert header.tensors.keys() == small.types.keys()
    check_structure(small.mmproj)


def test_other_than_planned(small: Files) -> None:
    experts = "blk.0.ffn_down_exps.weight"
    with pytest.raises(ValidationError, match=rf"{experts} has type Q2_K, the plan says Q3_K"):
        check_structure(small.text, {**small.types, experts: QUANT_TYPES["Q3_K"]})
    with pytest.raises(ValidationError, match="1 planned tensors are missing, the first is more"):
        check_structure(small.text, {**small.types, "more": QUANT_TYPES["F32"]})
    fewer = {name: quant_type for name, quant_type in small.types.items() if name != experts}
    with pytest.raises(ValidationError, match=f"1 tensors were not planned, the first is {experts}"):
        check_structure(small.text, fewer)


def test_overlapping_tensors(small: Files, tmp_path: Path) -> None:
    data = bytearray(small.text.read_bytes())
    name = b"blk.0.attn_k.weight"
    place = data.index(name) + len(name)
    (dimensions,) = struct.unpack_from("<I", data, place)
    struct.pack_into("<Q", data, place + 4 + 8 * dimensions + 4, 0)
    path = tmp_path / "overlap.gguf"
    path.write_bytes(data)
    with pytest.raises(ValidationError, match=r"overlap\.gguf: tensors .* overlap"):
        check_structure(path)


def test_describe(small: Files) -> None:
    description = describe(small.text)
    assert json.loads(json.dumps(description)) == description
    assert description["experts_bpw"] == 2.625
    assert 2.625 < description["bpw"] < 32
    assert description["types"]["Q2_K"]["tensors"] == 9
    assert sum(kind["n_weights"] for kind in description["types"].values()) == description["n_weights"]
    assert description["metadata"]["general.architecture"] == "qwen3vlmoe"
    assert description["metadata"]["tokenizer.ggml.tokens"] == "array of 512 values"
    assert describe(small.mmproj)["experts_bpw"] is None


def test_describe_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"model\.gguf: not a GGUF file"):
        describe(tmp_path / "model.gguf")

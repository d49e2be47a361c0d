"""Names are read as llama.cpp's `-hf` and the hub's pages read them."""

import re
from pathlib import Path

import pytest

from mode_gguf.gguf.shards import shard_paths
from mode_gguf.hub.names import HubModel, hub_model, is_model_file, quant_tag
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.workfolder import imatrix_file_name, model_file_name, projector_file_name

NAME = "Qwen3-VL-30B-A3B-Instruct"
LLAMA_CPP_SPLIT = re.compile(r"^(.+)-([0-9]{5})-of-([0-9]{5})$", re.IGNORECASE)
LLAMA_CPP_TAG = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE)
HUB_LABELS = (
    "F32|F16|Q4_0|Q4_1|Q8_0|Q5_0|Q5_1|Q2_K|Q3_K_S|Q3_K_M|Q3_K_L|Q4_K_S|Q4_K_M|Q5_K_S|Q5_K_M|Q6_K|IQ2_XXS|IQ2_XS|Q2_K_S|"
    "IQ3_XS|IQ3_XXS|IQ1_S|IQ4_NL|IQ3_S|IQ3_M|IQ2_S|IQ2_M|IQ4_XS|IQ1_M|BF16"
)
HUB_LABEL = re.compile(rf"({HUB_LABELS})(_[A-Z]+)?")


def model_of(tag: str, files: list[str]) -> str | None:
    """The file that llama.cpp takes for `-hf REPOSITORY:TAG`."""
    for file in files:
        if is_model_file(file) and re.search(tag + "[.-]", file, re.IGNORECASE):
            return file
    return None


@pytest.mark.parametrize("quant_type", sorted(QUANT_TYPES))
@pytest.mark.parametrize("groups", [False, True])
def test_the_tag_is_what_llama_cpp_reads(quant_type: str, groups: bool) -> None:
    name = model_file_name(NAME, 3.0, quant_type, groups=groups)
    for path in (*shard_paths(Path(name), 1), *shard_paths(Path(name), 12)):
        stem = path.stem
        if split := LLAMA_CPP_SPLIT.match(stem):
            stem = split[1]
        tag = LLAMA_CPP_TAG.search(stem)
        assert tag is not None
        assert tag[1] == quant_tag(path.name) == f"{quant_type}_MODE" + ("_GROUPS" if groups else "")


def test_the_hub_shows_a_quantization() -> None:
    for quant_type, label in {
        "Q2_K": "Q2_K_MODE",
        "Q3_K": "Q3_K_M",
        "Q4_K": "Q4_K_M",
        "IQ2_XXS": "IQ2_XXS_MODE",
    }.items():
        name = model_file_name(NAME, 3.0, quant_type).upper()
        assert [match[0] for match in HUB_LABEL.finditer(name)][-1] == label


def test_a_tag_finds_its_file_and_no_other() -> None:
    plain, groups = (model_file_name(NAME, 3.0, "Q3_K", groups=groups) for groups in (False, True))
    shards = [path.name for path in shard_paths(Path(model_file_name(NAME, 4.0, "Q4_K")), 3)]
    others = [projector_file_name(NAME, "F16"), imatrix_file_name(NAME), imatrix_file_name(NAME, "fisher")]
    files = sorted([*others, groups, plain, *shards])
    assert model_of("Q3_K_MODE", files) == plain
    assert model_of("Q3_K_MODE_GROUPS", files) == groups
    assert model_of("Q4_K_MODE", files) == shards[0]
    assert model_of("F16", files) is None
    assert [file for file in files if is_model_file(file)] == sorted([plain, groups, shards[0]])


def test_names_of_what_goes_with_the_model() -> None:
    assert projector_file_name(NAME, "F16").startswith("mmproj-")
    assert quant_tag(projector_file_name(NAME, "Q8_0")) == "Q8_0"
    assert all("imatrix" in imatrix_file_name(NAME, kind) for kind in ("plain", "fisher"))


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("Qwen/Qwen3-VL", HubModel("Qwen/Qwen3-VL")),
        ("Qwen/Qwen3-VL@main", HubModel("Qwen/Qwen3-VL", "main")),
        ("Qwen/Qwen3-VL@refs/pr/3", HubModel("Qwen/Qwen3-VL", "refs/pr/3")),
        ("./Qwen/Qwen3-VL", None),
        ("../Qwen3-VL", None),
        ("~/Qwen3-VL", None),
        ("/models/Qwen3-VL", None),
        ("models/Qwen/Qwen3-VL", None),
        ("Qwen3-VL", None),
        ("Qwen/Qwen3-VL@", None),
    ],
)
def test_what_names_a_model_on_the_hub(text: str, model: HubModel | None) -> None:
    assert hub_model(text) == model


def test_a_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-VL").mkdir(parents=True)
    assert hub_model("Qwen/Qwen3-VL") is None
    assert hub_model("Qwen/Qwen3-VL@main") == HubModel("Qwen/Qwen3-VL", "main")

"""A model with latent attention, stored in FP8, the whole way."""

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.export.imatrix import read_imatrix
from mode_gguf.importance.table import SensitivityTable
from mode_gguf.pipeline.facts import planned_tensors
from mode_gguf.validation.llama_cpp import LlamaModel
from tests.calibration.conftest import picture
from tests.families.pico.mistral4 import write_pico_mistral4


def test_convert_and_answer_about_a_picture(tmp_path: Path, run: Callable[..., str]) -> None:
    checkpoint, out = write_pico_mistral4(tmp_path / "Pico-Mistral", fp8=True), tmp_path / "out"
    samples = ("--image-samples", "1", "--text-samples", "1", "--no-validate", "--rounding", "nearest")
    types = ("--types", "Q2_K,Q4_K", "--dense-types", "Q2_K,Q4_K,Q8_0")
    result = json.loads(run("convert", checkpoint, "--bpw", "3.0", "--out", out, "--json", *samples, *types))
    assert 3.0 * 0.995 <= result["bpw"] <= 3.0
    plan = Plan.load(out / "plan.json")
    stored = {name: quant_type.name for name, quant_type in plan.types.items()}
    assert {stored[f"blk.{layer}.{part}.weight"] for layer in range(3) for part in ("attn_k_b", "attn_v_b")} == {"Q8_0"}
    assert {"F32", "BF16"}.isdisjoint(stored[f"blk.0.{name}.weight"] for name in ("attn_q_b", "ffn_up_shexp"))
    measured = {name.split(".")[2] for name in read_imatrix(next(out.glob("imatrix-fisher-*.gguf"))) if "attn" in name}
    assert measured == {"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_output"}
    roles = {tensor.name: tensor.role for tensor in text_tensors(Checkpoint.open(checkpoint))}
    table = SensitivityTable.load(out / "sensitivity.safetensors")
    assert {tensor.name: tensor.role for tensor in planned_tensors(plan, table)} == roles
    image: Image.Image = picture(0)
    with LlamaModel(Path(result["model"]), Path(result["mmproj"]), context=1024, threads=1) as model:
        assert model.generate(model.chat_template.question("What?", model.image_marker), image, max_tokens=4)

"""Converting what no family knows: from a base GGUF and the checkpoint, and from an importance matrix without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mode_gguf.allocation.plan import Plan
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.imatrix_file import write_imatrix
from mode_gguf.gguf.header import read_header
from tests.base_gguf import open_base, write_family_base, write_olmoe_base
from tests.e2e.conftest import Run, settings
from tests.families.pico.base import write_pico_olmoe

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them is an error from here on
from mode_gguf_cli.main import main
main()
"""


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico_olmoe(tmp_path_factory.mktemp("base") / "olmoe")


@pytest.fixture(scope="module")
def base(olmoe: Path) -> Path:
    return write_olmoe_base(olmoe, olmoe.parent / "olmoe-BF16.gguf", permute=True, swap_columns=True)


@pytest.fixture(scope="module")
def imatrix(base: Path) -> Path:
    """An importance matrix as llama-imatrix writes it: no entry for the output head, an expert without tokens."""
    rng = np.random.default_rng(0)
    entries = {}
    for tensor in open_base(base).tensors:
        if tensor.activation is not None and tensor.name != "output.weight":
            counts = np.full(tensor.n_experts, 100.0)
            counts[-1] = 0 if tensor.n_experts > 1 else 100
            sums = rng.uniform(1, 100, (tensor.n_experts, tensor.row_width))
            entries[tensor.name] = (sums * (counts[:, None] > 0), counts)
    path = base.parent / "stock-imatrix.gguf"
    write_imatrix(path, entries, ("wiki.txt",), chunk_count=4, chunk_size=50)
    return path


def test_from_base_and_checkpoint(olmoe: Path, base: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "work"
    asked = ("convert", olmoe, "--base-gguf", base, "--bpw", "4.5", "--out", out, "--text-samples", "2", "--json")
    estimate = json.loads(run(*asked, "--dry-run"))
    assert estimate["family"] == "OlmoeForCausalLM"
    assert not out.exists()
    result = json.loads(run(*asked, "--no-validate"))
    assert result["mmproj"] is None
    assert 4.5 * 0.99 <= result["bpw"] <= 4.5
    header = read_header(Path(result["model"]))
    assert header.metadata["general.architecture"] == "olmoe"
    types = Plan.load(out / "plan.json").types
    assert {types[f"blk.{layer}.attn_output.weight"].name for layer in range(3)} == {"Q6_K"}
    assert "3 of 13 matrices beside the experts equal no matrix" in (out / "mode-gguf.log").read_text()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "OLMo" in page or "olmoe" in page
    again = json.loads(run(*asked, "--no-validate"))
    assert not any(again["seconds"].values())
    other = write_olmoe_base(olmoe, tmp_path / "olmoe-BF16.gguf", permute=True)
    refused = run(*(other if part == base else part for part in asked), "--no-validate", code=2)
    assert "`calibrate` was run here with other settings (model fingerprint:" in refused
    run("publish", "me/model", out, "--card-only")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "The model is text-only." in card
    assert "from what text needs of every expert" in card
    assert "text-generation" in card
    assert "mtmd" not in card


def test_from_an_importance_matrix_without_torch(base: Path, imatrix: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "work"
    asked = ["convert", "--base-gguf", base, "--calibration-from", imatrix, "--bpw", "4.5", "--out", out]
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, asked), "--no-validate", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 4.5 * 0.99 <= result["bpw"] <= 4.5
    blind = "does not tell text from image"
    assert blind in " ".join(done.stderr.split())
    assert blind in (out / "mode-gguf.log").read_text()
    plan = Plan.load(out / "plan.json")
    assert (plan.made_from.sensitivity_method, plan.rounding, plan.preset) == ("imatrix-error", "nearest", "mode")
    statistics = CalibrationStatistics.load(out / "calibration.safetensors")
    assert statistics.imatrix == imatrix.name
    assert statistics.counts(0).tolist() == [[100, 100, 100, 0], [0] * 4, [0] * 4]
    assert "all tokens" in (out / "report.html").read_text(encoding="utf-8")
    run("publish", "me/model", out, "--card-only")
    assert "does not tell text from" in " ".join((out / "README.md").read_text(encoding="utf-8").split())
    assert read_header(Path(result["model"])).metadata["quantize.imatrix.dataset"] == "wiki.txt"


def test_a_familys_checkpoint_needs_no_base(pico: Path, tmp_path: Path, run: Run) -> None:
    family = Checkpoint.open(pico)
    text, _ = write_family_base(family, tmp_path)
    entries = {
        tensor.name: (np.ones((tensor.n_experts, tensor.row_width)), np.ones(tensor.n_experts))
        for tensor in open_base(text).tensors
        if tensor.activation is not None
    }
    write_imatrix(tmp_path / "imatrix.gguf", entries, ("d",), 1, 10)
    given = ("--calibration-from", tmp_path / "imatrix.gguf", "--out", tmp_path / "work", "--json", "--no-validate")
    result = json.loads(run("convert", pico, "--bpw", "4.0", *given))
    assert Path(result["mmproj"]).exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--rounding", "feedback"], "--rounding feedback needs the model run"),
        (settings("sensitivity.imatrix=fisher"), "sensitivity.imatrix fisher needs gradients"),
        (["--preset", "paper"], "leave --preset and sensitivity.method out"),
        (settings("plan.refine=1"), "leave them out"),
        (["--calibration", "somewhere"], "two sources of statistics"),
        (settings("checkpoint.pre_tokenizer=qwen2"), "the base GGUF has its tokenizer"),
        (["--granularity", "expert"], "leave it out with --base-gguf"),
        (["--fit", "8GiB", "--ctx", "4096"], "give --size or --bpw with --base-gguf"),
    ],
)
def test_what_cannot_be_had_is_refused(
    extra: list[str], message: str, base: Path, imatrix: Path, tmp_path: Path, run: Run
) -> None:
    asked = ("convert", "--base-gguf", base, "--calibration-from", imatrix, "--out", tmp_path / "work")
    assert message in run(*asked, *extra, code=2)


@pytest.mark.parametrize(
    "tuned", ["self_attn.v_proj", "mlp.gate", "post_attention_layernorm", "mlp.experts.1.gate_proj"]
)
def test_a_fine_tune_is_not_converted_to_its_originals_weights(
    tuned: str, olmoe: Path, base: Path, imatrix: Path, tmp_path: Path, run: Run
) -> None:
    tune, out = tmp_path / "tune", tmp_path / "work"
    shutil.copytree(olmoe, tune)
    weights = load_file(olmoe / "model.safetensors")
    weights[f"model.layers.1.{tuned}.weight"] *= 1.01
    save_file(weights, tune / "model.safetensors", {"format": "pt"})
    asked = ("convert", tune, "--base-gguf", base, "--bpw", "4.5", "--out", out)
    for extra in ((), ("--dry-run",), ("--calibration-from", imatrix)):
        refused = run(*asked, *extra, code=4)
        assert f"{base}: is not made from {tune}: " in refused
        assert "blk.1." in refused
        assert "convert this checkpoint with convert_hf_to_gguf.py" in refused
    assert not out.exists()


def test_what_is_missing_is_named(olmoe: Path, base: Path, imatrix: Path, pico: Path, tmp_path: Path, run: Run) -> None:
    out = ("--out", tmp_path / "work")
    assert "MODEL is missing" in run("convert", "--base-gguf", base, *out, code=2)
    assert "--base-mmproj goes with --base-gguf" in run("convert", olmoe, "--base-mmproj", base, *out, code=2)
    refused = run("convert", pico, "--base-gguf", base, *out, code=4)
    assert "names a vision encoder" in refused
    assert "given with --base-gguf" in run("convert", olmoe, *out, code=4)
    write_imatrix(tmp_path / "few.gguf", {"blk.0.attn_q.weight": (np.ones((1, 256)), np.ones(1))}, ("d",), 1, 1)
    asked = ("convert", "--base-gguf", base, *out, "--calibration-from")
    assert "has nothing of blk.0.ffn_gate_exps.weight" in run(*asked, tmp_path / "few.gguf", code=4)
    assert "no such file" in run(*asked, tmp_path / "none.gguf", code=4)
    write_imatrix(tmp_path / "other.gguf", {"blk.0.attn_q.weight": (np.ones((1, 128)), np.ones(1))}, ("d",), 1, 1)
    assert "it is of another model" in run(*asked, tmp_path / "other.gguf", code=4)
    needy = settings("sensitivity.types=Q2_K,Q3_K", "sensitivity.dense_types=IQ2_XXS,Q4_K")
    refused = run(*asked, imatrix, *needy, "--bpw", "3.2", code=4)
    assert "has nothing of output.weight, and IQ2_XXS needs it" in refused

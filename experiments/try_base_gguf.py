"""Try the door for models without a family on two of them, from stock conversion to validation in llama.cpp.

    python experiments/try_base_gguf.py --llama-cpp SOURCE --imatrix FOLDER --out FOLDER

SOURCE is a source tree of llama.cpp, whose converter needs sentencepiece; FOLDER of --imatrix holds llama-imatrix. Run
it from the root of the repository, with that in PYTHONPATH. Pico checkpoints with random weights
(tests/families/pico/base.py) are converted by stock to BF16, then each is quantized twice: run on samples
(`convert MODEL --base-gguf`), and from an importance matrix of llama-imatrix alone (`--calibration-from`). A row says
how far a result is from the BF16 file. Random weights say nothing about quality; more bits must be nearer.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compare_with_stock import convert_with_stock
from experiment_command import command_parser
from external_program import mode_gguf_command, run_program
from mode_gguf.data.samples import load_samples
from tests.families.pico.base import write_pico_idefics3_mixtral, write_pico_olmoe

MODELS = {"olmoe": write_pico_olmoe, "idefics3-mixtral": write_pico_idefics3_mixtral}
SEES = "idefics3-mixtral"


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="source tree of llama.cpp")
    parser.add_argument("--imatrix", type=Path, required=True, help="folder that holds llama-imatrix")
    parser.add_argument("--out", type=Path, required=True, help="where everything goes")
    parser.add_argument("--bpw", type=float, nargs="+", default=[3.5, 6.0])
    arguments = parser.parse_args()
    table = Table("model", "statistics", "bpw", "KL on text", "KL on answers", "first warning")
    for name, write in MODELS.items():
        checkpoint = write(arguments.out / name)
        base = arguments.out / f"{name}-BF16.gguf"
        stock = (arguments.llama_cpp.resolve(), checkpoint.resolve())
        convert_with_stock(*stock, base, "qwen2", outtype="bf16")
        options = ["--base-gguf", str(base)]
        if name == SEES:
            mmproj = arguments.out / f"mmproj-{name}-F16.gguf"
            convert_with_stock(*stock, mmproj, "qwen2", "--mmproj", outtype="f16")
            options += ["--base-mmproj", str(mmproj)]
        imatrix = _llama_imatrix(arguments.imatrix, base, arguments.out / f"imatrix-{name}-stock.gguf")
        ways = {
            "run on samples": [str(checkpoint), "--image-samples", "8", "--text-samples", "8"],
            "llama-imatrix": ["--calibration-from", str(imatrix)],
        }
        for way, given in ways.items():
            folder = arguments.out / f"{name}-{way.replace(' ', '-')}"
            for bpw in arguments.bpw:
                report = _convert([*given, *options, "--bpw", str(bpw), "--out", str(folder)], folder)
                text, image = (report[kind]["kl_mean"] if report[kind] else None for kind in ("text", "image"))
                warning = report["warnings"][0][:60] if report["warnings"] else ""
                kl = [f"{value:.4f}" if value is not None else "-" for value in (text, image)]
                table.add_row(name, way, f"{bpw:g}", *kl, warning)
    Console(width=160).print(table)
    return 0


def _llama_imatrix(folder: Path, model: Path, out: Path) -> Path:
    corpus = out.with_suffix(".txt")
    texts = [sample.text for sample in load_samples(max_image_samples=0) if sample.text is not None]
    corpus.write_text("\n\n".join(texts), encoding="utf-8")
    sizes = ["-c", 512, "-b", 512, "--chunks", 8, "-ngl", 0]
    run_program(folder / "llama-imatrix", "-m", model, "-f", corpus, "-o", out, *sizes)
    return out


def _convert(arguments: list[str], folder: Path) -> dict[str, Any]:
    run_program(*mode_gguf_command("convert", *arguments, "--device", "cpu", "--json"))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


if __name__ == "__main__":
    sys.exit(main())

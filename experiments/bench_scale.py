"""What a conversion takes at a large model's widths: time, memory and disk by number of layers, and beside stock tools.

    python experiments/bench_scale.py export --out FOLDER [--layers 2 4 8]
    python experiments/bench_scale.py speed --out FOLDER --llama-cpp SOURCE --llama-quantize PROGRAM
    python experiments/bench_scale.py calibrate --out FOLDER [--layers 2 4 8]
    python experiments/bench_scale.py stages --out FOLDER [--layers 2 4 8]
    python experiments/bench_scale.py disk --out FOLDER --layers 4

`export` and `calibrate` run the commands of those names in processes of their own and watch their memory: "anonymous"
is what the process itself fills, "resident" has the mapped part of the checkpoint with it; peaks of samples taken every
few milliseconds. Lines are fitted through them and drawn out to 48 and 94 layers (Qwen3-VL-30B-A3B, 235B-A22B's depth).
`stages` runs every stage of a conversion and puts what `convert --dry-run` says beside what was measured; `export`
there rounds with feedback first, and writes the projector.
`calibrate` also runs the plain forward of the same samples by transformers, the whole model in memory.
`disk` exports to BF16, so that packing is not the limit, beside reading the checkpoint and writing as many bytes as the
outputs have: nothing is cached when a round begins, and each ends when all is on the disk.
`speed` writes the same types with stock conversion plus llama-quantize, with the same importance matrix and threads.

The checkpoints, of 1.2 GB per layer and 1.2 GB besides, stay in FOLDER.
"""

import os
from pathlib import Path
from typing import Final

from experiment_command import add_json, command_parser, write_json
from mode_gguf.options import Packing
from mode_gguf.vocabulary import PACKING_MODES
from scale_export import TYPES, bench_disk, bench_export, bench_speed
from scale_measuring import bench_calibrate, bench_stages

BENCHES: Final = {
    "export": bench_export,
    "speed": bench_speed,
    "calibrate": bench_calibrate,
    "stages": bench_stages,
    "disk": bench_disk,
}


def main() -> None:
    """Run one of the benchmarks, print it, and write it if asked to."""
    parser = command_parser(__doc__)
    add_json(parser)
    parser.add_argument("bench", choices=tuple(BENCHES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--type", choices=TYPES, default="Q3_K")
    parser.add_argument("--packing", choices=PACKING_MODES, default=Packing().mode)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-cpp", type=Path, help="source tree of llama.cpp")
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--samples", default="demo/calibration")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--plain-layers", type=int, default=2, help="run the plain forward up to so many layers")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.json, BENCHES[arguments.bench](arguments))


if __name__ == "__main__":
    main()

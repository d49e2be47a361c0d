"""Digests of what `convert` writes for every family and the demo, to compare a change with that must not change it.

    python -m tests.digests before.json                     # on the commit before
    python -m tests.digests after.json --against before.json

Sums of gradients depend on the machine and its number of threads, so digests are compared on one machine and are not
kept in the repository. Torch computes on one thread here. Every case goes through the command line, in a process of
its own; `--jobs` of them side by side.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).parent.parent
FEW = ("--image-samples", "2", "--text-samples", "2", "--no-validate")
VOLATILE = ("tool version", "directory", "command", "finished", "seconds", "versions")
"""Parts of stages.json that say when and where something ran, not what it is."""


_BUILDERS = {"pico": "qwen3_vl_moe"}


def _pico(module: str, function: str, *arguments: Any, **options: Any) -> Callable[[Path], list[str | Path]]:
    """A case's MODEL argument: the checkpoint that a function of a module of pico builders writes.

    Its folder, which names the model in the files, is as it was when the builders had these names.
    """

    def written(folder: Path) -> list[str | Path]:
        builder = _BUILDERS.get(module, module.removeprefix("pico_"))
        writer = getattr(__import__(f"tests.families.pico.{builder}", fromlist=[function]), function)
        return [writer(folder / f"{module}-model", *arguments, **options)]

    return written


def _demo(folder: Path) -> list[str | Path]:
    return [ROOT / "demo" / "Demo-VL-MoE", "--calibration", ROOT / "demo" / "calibration"]


def _based(folder: Path) -> list[str | Path]:
    """Qwen3-VL's checkpoint, read as one without a family, from its own BF16 export."""
    from mode_gguf.checkpoint.folder import Checkpoint
    from tests.base_gguf import write_family_base
    from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe

    model = write_pico_qwen3vlmoe(folder / "model")
    text, projector = write_family_base(Checkpoint.open(model), folder)
    return [model, "--base-gguf", text, "--base-mmproj", projector]


QWEN = _pico("pico", "write_pico_qwen3vlmoe")
CASES: dict[str, tuple[Callable[[Path], list[str | Path]], tuple[str, ...]]] = {
    "qwen3vl": (QWEN, ("--bpw", "4.0", *FEW)),
    "qwen3vl-expert": (QWEN, ("--bpw", "4.0", "--granularity", "expert", *FEW)),
    "qwen3vl-exact": (QWEN, ("--size", "2MB", "--set", "sensitivity.packing.mode=exact", *FEW)),
    "qwen3vl-paper": (QWEN, ("--set", "plan.budget.expert_bpw=3.0", "--preset", "paper", *FEW)),
    "qwen3vl-unit-kl": (QWEN, ("--bpw", "4.0", "--set", "plan.unit_kl=true", "--rounding", "nearest", *FEW)),
    "qwen3vl-refine": (
        QWEN,
        ("--bpw", "4.0", "--set", "plan.refine=1", "--set", "sensitivity.measured_samples=4", *FEW),
    ),
    "qwen3_5": (_pico("pico_qwen3_5_moe", "write_pico_qwen3_5_moe", mtp=True), ("--bpw", "4.0", *FEW)),
    "gemma4": (_pico("pico_gemma4_moe", "write_pico_gemma4_moe"), ("--bpw", "4.5", *FEW)),
    "glm4v": (_pico("pico_glm4v_moe", "write_pico_glm4v_moe"), ("--bpw", "4.5", *FEW)),
    "internvl": (_pico("pico_internvl", "write_pico_internvl"), ("--bpw", "4.0", *FEW)),
    "internvl-hf": (_pico("pico_internvl", "write_pico_internvl", layout="transformers"), ("--bpw", "4.0", *FEW)),
    "kimi-vl": (_pico("pico_kimi", "write_pico_kimi", "kimi_vl"), ("--bpw", "3.5", *FEW)),
    "kimi-k25": (_pico("pico_kimi", "write_pico_kimi", "kimi_k25_packed"), ("--bpw", "4.0", *FEW)),
    "mistral4": (_pico("pico_mistral4", "write_pico_mistral4", fp8=True), ("--bpw", "4.0", *FEW)),
    "base": (_based, ("--bpw", "4.0", *FEW)),
    "demo": (_demo, ("--bpw", "3.0", "--no-validate")),
    "demo-expert": (_demo, ("--bpw", "2.8", "--granularity", "expert", "--rounding", "nearest", "--no-validate")),
}


def main() -> None:
    """Run the cases; write their digests; say what differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="JSON file of digests to write")
    parser.add_argument("--against", type=Path, help="digests to compare with; ends with 1 where any differs")
    parser.add_argument("--only", default="", help="cases to run, comma-separated; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    arguments = parser.parse_args()
    names = [name for name in CASES if not arguments.only or name in arguments.only.split(",")]
    digests: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        for name, digest in zip(names, pool.map(partial(_case, Path(folder)), names), strict=True):
            digests[name] = digest
            arguments.out.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            print(name, file=sys.stderr)
    if arguments.against:
        before = json.loads(arguments.against.read_text(encoding="utf-8"))
        changes = [line for name in names for line in _changes(name, before.get(name), digests[name])]
        print("\n".join(changes) or f"{len(names)} cases: all digests are equal")
        sys.exit(bool(changes))


def _case(folder: Path, name: str) -> dict[str, Any]:
    """Convert in a process of its own; digests of what it wrote."""
    model, options = CASES[name]
    place = folder / name
    place.mkdir()
    out = place / "out"
    arguments = [*map(str, model(place)), *options, "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, "-m", "mode_gguf_cli", "convert", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        check=False,
    )
    if ended.returncode:
        return {"failed": ended.stderr.splitlines()[-3:]}
    return {path.name: _digest(path) for path in sorted(out.iterdir()) if path.suffix in _DIGESTS}


def _digest(path: Path) -> Any:
    return _DIGESTS[path.suffix](path)


def _of_bytes(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _of_arrays(path: Path) -> str:
    """Digest of the numbers in a safetensors file, whatever its header says about them."""
    digest = hashlib.sha256()
    with safe_open(path, "numpy") as file:
        for name in sorted(file.keys()):
            array = file.get_tensor(name)
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _of_json(path: Path) -> Any:
    """The plan itself; of stages.json what each stage depends on and writes."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "plan.json":
        value["made_from"].pop("tool_version", None)
        # The identity of a file of measurements, whose arrays have a digest of their own.
        value["made_from"].pop("sensitivity_fingerprint", None)
        value["made_from"].pop("model_fingerprint", None)  # of all weights now, where it was of some bytes of them
        value.pop("expert_granularity", None)  # what a type per expert would cost, which plans no longer say
        value["tensors"] = {tensor["name"]: json.dumps(tensor, sort_keys=True) for tensor in value["tensors"]}
        return value
    if path.name != "stages.json":
        return "written"
    return {
        stage: {
            "settings": {key: made for key, made in entry["settings"].items() if key not in VOLATILE},
            "outputs": sorted(entry["outputs"]),
        }
        for stage, entry in value.items()
    }


_DIGESTS: dict[str, Callable[[Path], Any]] = {
    ".gguf": _of_bytes,
    ".safetensors": _of_arrays,
    ".json": _of_json,
    ".txt": _of_bytes,
}


def _changes(name: str, before: Any, now: Any) -> Iterator[str]:
    """A line per difference, by the path to it."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _changes(f"{name} / {key}", before.get(key), now.get(key))
    elif before != now:
        yield f"{name}: {before} then, {now} now"


if __name__ == "__main__":
    main()

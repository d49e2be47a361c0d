"""The work folder of one conversion: what its files are called, and which stages need not run again."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mode_gguf.artifacts import write_json


def model_file_name(name: str, bpw: float, main_type: str, *, groups: bool = False) -> str:
    """`Qwen3-VL-30B-A3B-Instruct-MODE-3.00bpw-Q3_K_MODE.gguf`.

    llama.cpp and the hub read the tag after the last `-`, which must be upper-case letters, digits and underscores;
    a name ending in the size would have the tag `00BPW`. `_GROUPS` at its end: stock llama.cpp cannot load the file,
    because experts of a layer have different types.
    """
    return f"{name}-MODE-{bpw:.2f}bpw-{main_type}_MODE{'_GROUPS' if groups else ''}.gguf"


def projector_file_name(name: str, quant_type: str) -> str:
    """`mmproj-<name>-F16.gguf`; front ends look for names that start with `mmproj-`."""
    return f"mmproj-{name}-{quant_type}.gguf"


def imatrix_file_name(name: str, kind: str = "plain") -> str:
    """`imatrix-<name>.gguf`, or with a kind other than plain `imatrix-<kind>-<name>.gguf`.

    Without "imatrix" in its name a download by repository might take it for the model.
    """
    return f"imatrix-{name}.gguf" if kind == "plain" else f"imatrix-{kind}-{name}.gguf"


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Paths of everything a conversion of the model `name` writes under `path`."""

    path: Path
    name: str

    @property
    def calibration(self) -> Path:
        return self.path / "calibration.safetensors"

    @property
    def imatrix(self) -> Path:
        return self.imatrix_of("plain")

    def imatrix_of(self, kind: str) -> Path:
        return self.path / imatrix_file_name(self.name, kind)

    @property
    def sensitivity(self) -> Path:
        return self.path / "sensitivity.safetensors"

    @property
    def token_weights(self) -> Path:
        return self.path / "token-weights.safetensors"

    @property
    def rounded(self) -> Path:
        return self.path / "rounded"

    @property
    def rounding(self) -> Path:
        return self.path / "rounding.json"

    @property
    def unit_kl(self) -> Path:
        return self.path / "unit-kl.safetensors"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def granularity(self) -> Path:
        return self.path / "granularity.json"

    @property
    def frontier(self) -> Path:
        return self.path / "frontier.json"

    @property
    def frontier_plot(self) -> Path:
        return self.path / "frontier.png"

    @property
    def tensor_types(self) -> Path:
        return self.path / "tensor-types.txt"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def stages(self) -> Path:
        return self.path / "stages.json"


class StageLedger:
    """Remembers, in stages.json, from which inputs each stage last made its outputs, and how long it took.

    A stage is run again when its inputs' fingerprint differs or an output is missing or has another size.
    """

    def __init__(self, folder: WorkFolder) -> None:
        self._path = folder.stages
        self.seconds: dict[str, float] = {}
        """Wall-clock seconds of each stage in this run; 0 for one that was reused."""

    def is_current(self, stage: str, inputs: str) -> bool:
        """Whether the outputs of `stage` are there and were made from `inputs`."""
        entry = self._read().get(stage)
        current = entry is not None and entry["inputs"] == inputs and entry["outputs"] == _sizes(entry["outputs"])
        if current:
            self.seconds[stage] = 0.0
        return current

    @contextmanager
    def running(self, stage: str, inputs: str, outputs: Sequence[Path]) -> Iterator[None]:
        """Time a stage and record it once it has ended without an error."""
        started = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - started, 3)
        sizes = _sizes([str(path) for path in outputs])
        entry = {"inputs": inputs, "outputs": sizes, "seconds": self.seconds[stage]}
        write_json(self._path, {**self._read(), stage: entry})

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            entries = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # No ledger, or one that cannot be trusted: every stage runs.
        return entries if isinstance(entries, dict) else {}


def _sizes(paths: Sequence[str] | dict[str, int]) -> dict[str, int]:
    return {path: Path(path).stat().st_size if Path(path).exists() else -1 for path in paths}

"""The work folder of one conversion: names and paths of its files."""

from dataclasses import dataclass
from pathlib import Path

JOURNAL = "mode_gguf.journal"
"""Name of the logger that writes to a work folder's log file and nowhere else."""


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


def mtp_file_name(name: str, quant_type: str) -> str:
    """`mtp-<name>-Q8_0.gguf`; llama.cpp looks for names that start with `mtp-`."""
    return f"mtp-{name}-{quant_type}.gguf"


def imatrix_file_name(name: str, kind: str = "plain") -> str:
    """`imatrix-<name>.gguf`, or with a kind other than plain `imatrix-<kind>-<name>.gguf`.

    Without "imatrix" in its name a download by repository might take it for the model.
    """
    return f"imatrix-{name}.gguf" if kind == "plain" else f"imatrix-{kind}-{name}.gguf"


def failure_path(report: Path) -> Path:
    """The path of the text that says why validation failed, in place of a report."""
    return report.with_name(f"{report.stem}-failed.txt")


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
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def frontier(self) -> Path:
        return self.path / "frontier.json"

    @property
    def frontier_plot(self) -> Path:
        return self.path / "frontier.svg"

    @property
    def tensor_types(self) -> Path:
        return self.path / "tensor-types.txt"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        return self.report.with_suffix(".html")

    @property
    def readme(self) -> Path:
        return self.path / "README.md"

    @property
    def stages(self) -> Path:
        return self.path / "stages.json"

    @property
    def reference(self) -> Path:
        return self.path / "reference"

    @property
    def log(self) -> Path:
        return self.path / "mode-gguf.log"

    @property
    def lock(self) -> Path:
        return self.path / ".mode-gguf.lock"

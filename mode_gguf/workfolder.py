"""The work folder of one conversion: names and paths of its files."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from mode_gguf.errors import InputError

JOURNAL = "mode_gguf.journal"
"""Name of the logger that writes to a work folder's log file and nowhere else."""
_MAX_NAME_BYTES: Final = 255
"""Of a file's name, in the file systems that there are."""
_MAX_STEM_BYTES: Final = 150
"""Of a model's name in a file's: type, size, shard number and the ending of an unfinished file come on top."""
_NO_FILE_NAME: Final = frozenset('/\\:*?"<>|')


def file_stem(model: str) -> str:
    """The name of a model as files and folders have it, `_` for what no file's name can hold everywhere.

    A checkpoint's folder may be called anything, line breaks included.
    """
    kept = "".join(c if c.isprintable() and c not in _NO_FILE_NAME else "_" for c in model)
    return kept.encode()[:_MAX_STEM_BYTES].decode(errors="ignore") or "model"


def model_file_name(name: str, bpw: float, main_type: str, *, groups: bool = False) -> str:
    """`Qwen3-VL-30B-A3B-Instruct-MODE-3.00bpw-Q3_K_MODE.gguf`.

    llama.cpp and the hub read the tag after the last `-`, which must be upper-case letters, digits and underscores;
    a name ending in the size would have the tag `00BPW`. `_GROUPS` at its end: stock llama.cpp cannot load the file,
    because experts of a layer have different types.
    """
    return f"{file_stem(name)}-MODE-{bpw:.2f}bpw-{main_type}_MODE{'_GROUPS' if groups else ''}.gguf"


def uniform_file_name(name: str, main_type: str) -> str:
    """`Qwen3-VL-30B-A3B-Instruct-BF16.gguf`, of a plan without a budget."""
    return f"{file_stem(name)}-{main_type}.gguf"


def projector_file_name(name: str, quant_type: str) -> str:
    """`mmproj-<name>-F16.gguf`; front ends look for names that start with `mmproj-`."""
    return f"mmproj-{file_stem(name)}-{quant_type}.gguf"


def mtp_file_name(name: str, quant_type: str) -> str:
    """`mtp-<name>-Q8_0.gguf`; llama.cpp looks for names that start with `mtp-`."""
    return f"mtp-{file_stem(name)}-{quant_type}.gguf"


def imatrix_file_name(name: str, kind: str = "plain") -> str:
    """`imatrix-<name>.gguf`, or with a kind other than plain `imatrix-<kind>-<name>.gguf`.

    Without "imatrix" in its name a download by repository might take it for the model.
    """
    stem = file_stem(name)
    return f"imatrix-{stem}.gguf" if kind == "plain" else f"imatrix-{kind}-{stem}.gguf"


def failure_path(report: Path) -> Path:
    """The path of the text that says why validation failed, in place of a report."""
    return report.with_name(f"{report.stem}-failed.txt")


class _FolderEntry:
    """A file or folder in a work folder, by its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: "WorkFolder", owner: type["WorkFolder"]) -> Path:
        return folder.path / self._name


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Paths of everything a conversion of the model `name` writes under `path`."""

    path: Path
    name: str

    calibration = _FolderEntry("calibration.safetensors")
    probes = _FolderEntry("probes.safetensors")
    sensitivity = _FolderEntry("sensitivity.safetensors")
    token_weights = _FolderEntry("token-weights.safetensors")
    rounded = _FolderEntry("rounded")
    rounding = _FolderEntry("rounding.json")
    unit_kl = _FolderEntry("unit-kl.safetensors")
    plan = _FolderEntry("plan.json")
    recipe = _FolderEntry("recipe.yaml")
    frontier = _FolderEntry("frontier.json")
    frontier_plot = _FolderEntry("frontier.svg")
    tensor_types = _FolderEntry("tensor-types.txt")
    report = _FolderEntry("report.json")
    page = _FolderEntry("report.html")
    readme = _FolderEntry("README.md")
    stages = _FolderEntry("stages.json")
    digests = _FolderEntry(".mode-gguf.digests")
    reference = _FolderEntry("reference")
    log = _FolderEntry("mode-gguf.log")
    lock = _FolderEntry(".mode-gguf.lock")

    @property
    def imatrix(self) -> Path:
        return self.imatrix_of("plain")

    def imatrix_of(self, kind: str) -> Path:
        return self.file(imatrix_file_name(self.name, kind))

    def file(self, name: str) -> Path:
        """The path of an output by its name: the one place that sees that outputs lie in the folder.

        Parts of names come from plan.json, stages.json and measurements, which people edit and strangers send.

        Raises:
            InputError: the name is that of no file, or leaves the folder.
        """
        readings = (PurePosixPath(name).name, PureWindowsPath(name).name)
        plain = name.isprintable() and name not in ("", "..") and all(reading == name for reading in readings)
        if not plain or len(os.fsencode(name)) > _MAX_NAME_BYTES:
            raise InputError(
                f"{self.path}: {name!r:.200} is no name of a file in this folder; expected one without separators and "
                f"control characters, of {_MAX_NAME_BYTES} bytes at most: correct the record that has it "
                f"({self.plan.name}, {self.stages.name}), or make it again"
            )
        return self.path / name

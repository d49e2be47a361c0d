"""Models without a family of ours: names, metadata and tensors from GGUF files that stock conversion made.

The text model's file says what every tensor is by its name alone; the projector's is copied. Both are mapped from disk,
and an expert is read when it is asked for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import Keys

from mode_gguf.architectures.tensors import ALL_ROWS, Array, Order, Role, SourceTensor
from mode_gguf.checkpoint.finite import check_finite
from mode_gguf.errors import InputError
from mode_gguf.gguf.header import GgufHeader, TensorInfo, read_header
from mode_gguf.gguf.shards import COUNT_KEY, NUMBER_KEY, TENSORS_KEY
from mode_gguf.plain_text import file_name_part

FLOAT_TYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

EXPERTS: Final = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.weight")
_LAYER: Final = re.compile(r"blk\.(\d+)\.")
_KEPT: Final = (
    "_norm.weight",
    "ffn_gate_inp",
    "ffn_gate_tid2eid",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "position_embd",
    "token_types",
    "conv1d",
    "shortconv.conv",
    "indexer.",
    "time_mix_",
    "attn_rel_b",
    "rope_freqs",
)
"""Parts of the names of matrices that llama-quantize keeps: routers, norms, and what is too small to matter."""

_SMALLEST_BLOCK: Final = 32
_NOT_COPIED: Final = (
    Keys.General.ARCHITECTURE,
    Keys.General.FILE_TYPE,
    Keys.General.QUANTIZATION_VERSION,
    Keys.General.QUANTIZED_BY,
    Keys.General.ALIGNMENT,
    NUMBER_KEY,
    COUNT_KEY,
    TENSORS_KEY,
)
_PROJECTOR: Final = "clip"
_NAME_END: Final = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)
_TYPE_END: Final = re.compile(r"[-_.](BF16|F16|F32|FP16|FP32)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GgufReader:
    """A `Reader` of one tensor of a GGUF file, an object so that it can be sent to other processes."""

    info: TensorInfo
    by_expert: bool

    def __call__(self, index: int, rows: slice = ALL_ROWS, /) -> Array:
        """Expert `index`, or the tensor itself; only those rows are read.

        Raises:
            InputError: one of the weights is NaN or infinite, or the file cannot be read any more.
        """
        try:
            stored = np.memmap(self.info.file, FLOAT_TYPES[self.info.type], "r", self.info.offset, self.info.shape)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.info.file}: tensor {self.info.name} cannot be read ({error})") from error
        read = np.array(stored[index][rows] if self.by_expert else stored[rows], order="C", subok=False)
        parts = (index, rows) if self.by_expert else (rows,)
        return check_finite(read, self.info.file, self.info.name, self.info.shape, parts)


@dataclass(frozen=True, slots=True)
class BaseGguf:
    """The GGUF files that a conversion starts from; make one with `open_base`.

    Attributes:
        text, projector: heads of the files; no projector for text-only models.
        tensors, projector_tensors: of the files, in their order.
        unmatched: dense matrices that no checkpoint tensor was found to equal, so that nothing is known of their
            inputs; None where there is no checkpoint to compare with.
    """

    text: GgufHeader
    projector: GgufHeader | None
    tensors: tuple[SourceTensor, ...]
    projector_tensors: tuple[SourceTensor, ...]
    unmatched: tuple[str, ...] | None = None

    @property
    def architecture(self) -> str:
        """general.architecture of the text model."""
        return str(self.text.metadata[Keys.General.ARCHITECTURE])

    @property
    def files(self) -> tuple[Path, ...]:
        """Paths of the GGUF files, the text model's first one first."""
        return (*self.text.files, *(self.projector.files if self.projector else ()))

    @property
    def name(self) -> str:
        """The model's name: the file's, without shard number and type."""
        file = self.text.files[0]
        return file_name_part(_TYPE_END.sub("", _NAME_END.sub("", file.name)) or file.stem)

    def setting(self, key: str) -> Any:
        """A value of the text model's architecture, by a key with `{arch}`; None if it is not there."""
        return self.text.metadata.get(key.format(arch=self.architecture))

    def with_statistics(self, matched: Mapping[str, tuple[str, Order | None]]) -> "BaseGguf":
        """The base with the checkpoint tensors that dense matrices equal; all others lose their statistics.

        Args:
            matched: checkpoint name, and order where it differs, by GGUF name.
        """
        tensors, unmatched = [], []
        for tensor in self.tensors:
            if tensor.role in (Role.DENSE, Role.OUTPUT):
                source, order = matched.get(tensor.name, (None, None))
                if source is None:
                    unmatched.append(tensor.name)
                    tensor = replace(tensor, activation=None)
                else:
                    tensor = replace(tensor, sources=(source,), order=order)
            tensors.append(tensor)
        return replace(self, tensors=tuple(tensors), unmatched=tuple(unmatched))


def open_base(path: Path, mmproj: Path | None = None) -> BaseGguf:
    """Read the heads of a base GGUF, all of its shards, and of its projector.

    Raises:
        InputError: a file is no GGUF, is quantized, has no routed experts, or is of the other kind.
    """
    text = read_header(path)
    architecture = text.metadata.get(Keys.General.ARCHITECTURE)
    if not isinstance(architecture, str) or architecture == _PROJECTOR:
        kind = "a projector" if architecture == _PROJECTOR else f"general.architecture {architecture!r}"
        raise InputError(f"{path}: {kind} found, expected the text model's file; give a projector as --base-mmproj")
    _check_types(path, text)
    tensors = tuple(_text_tensor(info) for info in text.tensors.values())
    _check_experts(path, architecture, text, tensors)
    projector = None if mmproj is None else read_header(mmproj)
    projector_tensors: tuple[SourceTensor, ...] = ()
    if projector is not None and mmproj is not None:
        _check_projector(mmproj, projector)
        widest = {info.type for info in projector.tensors.values()} - {"F32"}
        projector_tensors = tuple(_projector_tensor(info, bool(widest)) for info in projector.tensors.values())
    return BaseGguf(text, projector, tensors, projector_tensors)


def copied_keys(header: GgufHeader) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Keys, values and their types that a file made from this one has, too."""
    return [
        (key, value, header.value_types[key])
        for key, value in header.metadata.items()
        if key not in _NOT_COPIED and not key.startswith(("quantize.", "general.base_model.")) and value != []
    ]


def _check_types(path: Path, header: GgufHeader) -> None:
    for info in header.tensors.values():
        if info.type not in FLOAT_TYPES:
            raise InputError(
                f"{path}: tensor {info.name} has type {info.type}; expected a base in full precision (F32, F16 or "
                "BF16), as convert_hf_to_gguf.py writes with --outtype bf16"
            )


def _check_experts(path: Path, architecture: str, text: GgufHeader, tensors: Sequence[SourceTensor]) -> None:
    """Routed experts are there, in layers that have all of their projections, and in the number that is declared."""
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
    if not experts:
        raise InputError(
            f"{path}: no routed experts (blk.N.ffn_*_exps.weight) in this {architecture} model; use llama-quantize for "
            "dense models"
        )
    declared = text.metadata.get(Keys.LLM.EXPERT_COUNT.format(arch=architecture))
    by_layer: dict[int, set[str]] = {}
    for tensor in experts:
        if len(tensor.shape) != 3 or (declared is not None and tensor.n_experts != declared):
            raise InputError(
                f"{path}: {tensor.name} has shape {list(tensor.shape)}, expected {declared} experts of one layer, "
                "[experts, rows, columns]; convert the checkpoint again"
            )
        by_layer.setdefault(tensor.layer or 0, set()).add(str(tensor.projection))
    whole = ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"})
    for layer, projections in by_layer.items():
        if projections not in whole:
            raise InputError(
                f"{path}: layer {layer} has experts' {', '.join(sorted(projections))} alone; expected gate, up and "
                "down; convert the checkpoint again"
            )
    blocks = int(text.metadata.get(Keys.LLM.BLOCK_COUNT.format(arch=architecture), 0))
    predicting = int(text.metadata.get(Keys.LLM.NEXTN_PREDICT_LAYERS.format(arch=architecture), 0) or 0)
    beyond = [tensor.name for tensor in experts if (tensor.layer or 0) >= blocks - predicting]
    if beyond and predicting:
        raise InputError(
            f"{path}: {beyond[0]} belongs to a block for multi-token prediction, of which calibration sees nothing; "
            "convert the checkpoint with --no-mtp"
        )
    if not any(tensor.role is Role.EMBEDDING for tensor in tensors):
        raise InputError(f"{path}: no token_embd.weight; convert the checkpoint again")


def _check_projector(path: Path, header: GgufHeader) -> None:
    if header.metadata.get(Keys.General.ARCHITECTURE) != _PROJECTOR:
        raise InputError(
            f"{path}: general.architecture is {header.metadata.get(Keys.General.ARCHITECTURE)!r}, expected 'clip'; "
            "make the projector with convert_hf_to_gguf.py --mmproj"
        )
    _check_types(path, header)


def _text_tensor(info: TensorInfo) -> SourceTensor:
    """A tensor with the role that its name gives it."""
    name, layer = info.name, _LAYER.match(info.name)
    number = int(layer[1]) if layer else None
    if experts := EXPERTS.fullmatch(name):
        projection = experts[2]
        seen = f"blk.{number}.ffn_exps.{'hidden' if projection == 'down' else 'input'}"
        return SourceTensor(name, info.shape, Role.EXPERT, (name,), GgufReader(info, True), seen, number, projection)
    role = {"token_embd.weight": Role.EMBEDDING, "output.weight": Role.OUTPUT}.get(name, Role.DENSE)
    small = len(info.shape) < 2 or info.shape[-1] % _SMALLEST_BLOCK
    if small or not name.endswith(".weight") or any(part in name for part in _KEPT):
        role = Role.KEEP
    activation = name if role in (Role.DENSE, Role.OUTPUT) else None
    return SourceTensor(name, info.shape, role, (name,), GgufReader(info, False), activation, number)


def _projector_tensor(info: TensorInfo, mixed: bool) -> SourceTensor:
    """A tensor of the projector; it stays F32 where the converter kept it so, or is a vector or positions."""
    kept = len(info.shape) < 2 or "position_embd" in info.name or (mixed and info.type == "F32" and len(info.shape) < 4)
    role = Role.KEEP if kept else Role.DENSE
    return SourceTensor(info.name, info.shape, role, (info.name,), GgufReader(info, False))

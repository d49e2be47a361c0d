"""A Hugging Face checkpoint folder: configuration, tensor index, and weights that are read slice by slice.

Only the safetensors headers are read on opening; weights are mapped from disk when asked for, so that reading one
expert touches that expert's bytes and nothing else. Pickled weights are never opened.
"""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mode_gguf.checkpoint import adapter, quantized
from mode_gguf.checkpoint.header import refuse_type
from mode_gguf.checkpoint.identity import ModelIdentity
from mode_gguf.checkpoint.index import INDEX_FILE, SINGLE_FILE, weight_tensors
from mode_gguf.checkpoint.names import check_unwrapped, without_buffers
from mode_gguf.checkpoint.side_files import read_json
from mode_gguf.checkpoint.stored_tensor import WEIGHT_DTYPES, Index, StoredTensor
from mode_gguf.checkpoint.weights import equal_weights, read_weights
from mode_gguf.errors import InputError
from mode_gguf.plain_text import file_name_part
from mode_gguf.regular_files import check_regular

if TYPE_CHECKING:
    from mode_gguf.architectures.base_gguf import BaseGguf

__all__ = ["INDEX_FILE", "SINGLE_FILE", "Checkpoint", "Index", "read_json"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint folder; make one with `Checkpoint.open`.

    Attributes:
        path: the folder.
        name: of the model: the folder's, or the repository's when the folder is a snapshot in the hub's cache; as it
            can be part of a file's name (`file_name_part`).
        repository: `owner/name` when the folder is a snapshot in the hub's cache, else None.
        revision: the snapshot's commit, else None.
        config: config.json; without settings of quantization, since weights are decoded.
        tensors: what is stored where, by checkpoint name, in the order of the index.
        identity: what tells the model from others, whatever the folder is called and wherever it lies.
        base: GGUF files that names, metadata and tensors are taken from, of a model without a family; the checkpoint
            is then what the model is run from, and may be missing (no configuration and no tensors).
        pre_tokenizer: llama.cpp's name of the tokenizer's, as the user gave it; None where it is to be recognised.
    """

    path: Path
    name: str
    repository: str | None
    revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    identity: ModelIdentity
    base: "BaseGguf | None" = None
    pre_tokenizer: str | None = None

    @property
    def fingerprint(self) -> str:
        """Digest of config.json, the index and all weights, which are read the first time.

        Raises:
            InputError: a file of the weights cannot be read.
        """
        return self.identity.fingerprint()

    def identified(self) -> "Checkpoint":
        """The checkpoint with its fingerprint, for processes that have not read the weights for it."""
        return replace(self, identity=replace(self.identity, known=self.fingerprint))

    @property
    def files(self) -> set[Path]:
        """The files of the weights."""
        return {stored.file for stored in self.tensors.values()} or set(self.base.files if self.base else ())

    @classmethod
    def open(cls, folder: Path, pre_tokenizer: str | None = None) -> "Checkpoint":
        """Open a folder with config.json and one or several safetensors files.

        Raises:
            InputError: the folder, its configuration, its index or a shard's header cannot be used; nothing but
                the headers is looked at here.
        """
        _check_folder(folder)
        config = read_json(folder / "config.json")
        whole = deepcopy(config)
        settings = quantized.taken_settings(config)
        quantized.check_supported(folder, settings)
        stored = weight_tensors(folder)
        check_unwrapped(folder, stored)
        tensors = quantized.decodable(folder, without_buffers(stored), settings)
        for name, tensor in tensors.items():
            if tensor.dtype not in WEIGHT_DTYPES and not tensor.is_packed:
                raise refuse_type(tensor.file, name, tensor.dtype)
        if beside := adapter.found_in(folder):
            log.warning("%s: an adapter lies beside the weights and is left out (%s); %s", *beside)
        repository, revision = _cached_snapshot(folder) or (None, None)
        return cls(
            path=folder,
            name=file_name_part(repository.rpartition("/")[2] if repository else folder.resolve().name),
            repository=repository,
            revision=revision,
            config=config,
            tensors=tensors,
            identity=ModelIdentity.of(whole, stored),
            pre_tokenizer=pre_tokenizer,
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the stored tensor `name`."""
        return self._stored(name).shape

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A copy of `tensor[index]` (all of it for None); only those bytes are read.

        Returns:
            float32, float16, or for bfloat16 its raw bits in uint16, C-contiguous; float32 for FP8 and packed weights,
            of which an index selects rows. float32 for float64, too.

        Raises:
            InputError: no such tensor, one of the weights is NaN or infinite, or the file has become shorter since the
                checkpoint was opened.
        """
        return read_weights(name, self._stored(name), index)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape and weights; raises like `read`."""
        return equal_weights((first, self._stored(first)), (second, self._stored(second)))

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise InputError(
                f"{self.path}: tensor {name} is missing from the checkpoint; download it again or check config.json"
            ) from None


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        adapter.refuse_alone(folder)
        as_hugging_face = [folder / name for name in ("config.json", INDEX_FILE, SINGLE_FILE)]
        if any(folder.glob("consolidated*.safetensors")) and not all(
            any(path.exists() for path in paths) for paths in (as_hugging_face[:1], as_hugging_face[1:])
        ):
            raise InputError(
                f"{folder}: weights in Mistral's own layout (consolidated.safetensors, params.json) found, expected "
                f"Hugging Face's (config.json and model.safetensors); download those files of the same repository"
            )
        return
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; expected a Hugging Face checkpoint folder on disk")
    check_regular(folder, "checkpoint folder")
    with folder.open("rb") as file:
        kind = "a GGUF file" if file.read(4) == b"GGUF" else "a file"
    raise InputError(
        f"{folder}: {kind} found, expected a Hugging Face checkpoint folder (config.json and safetensors); "
        "conversion starts from the original weights"
    )


def _cached_snapshot(folder: Path) -> tuple[str, str] | None:
    """`owner/name` and revision for .../models--owner--name/snapshots/<revision>, the layout of the hub's cache."""
    parents = folder.absolute().parents
    if len(parents) < 2 or parents[0].name != "snapshots" or not parents[1].name.startswith("models--"):
        return None
    return "/".join(parents[1].name.removeprefix("models--").split("--", 1)), folder.absolute().name

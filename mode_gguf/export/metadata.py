"""general.* and quantize.* keys, by which hubs and front ends recognise a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
from gguf import GGUFValueType, GGUFWriter, LlamaFileType

from mode_gguf.architectures import Metadata
from mode_gguf.architectures.base_gguf import copied_keys
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.imatrix_file import read_imatrix_header
from mode_gguf.export.model_card import read_model_card
from mode_gguf.gguf.header import GgufHeader
from mode_gguf.quantization.types import QuantType, type_of_most_weights

QUANTIZED_BY = "mode-gguf"

_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q2_K": LlamaFileType.MOSTLY_Q2_K,
    "Q3_K": LlamaFileType.MOSTLY_Q3_K_M,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_M,
    "Q5_K": LlamaFileType.MOSTLY_Q5_K_M,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "IQ2_XXS": LlamaFileType.MOSTLY_IQ2_XXS,
    "IQ2_XS": LlamaFileType.MOSTLY_IQ2_XS,
    "IQ2_S": LlamaFileType.MOSTLY_IQ2_S,
    "IQ3_XXS": LlamaFileType.MOSTLY_IQ3_XXS,
    "IQ3_S": LlamaFileType.MOSTLY_IQ3_S,
    "IQ4_XS": LlamaFileType.MOSTLY_IQ4_XS,
    "IQ4_NL": LlamaFileType.MOSTLY_IQ4_NL,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
}


def main_expert_type(tensors: Sequence[SourceTensor], types: Mapping[str, QuantType]) -> QuantType:
    """The type that holds the most expert weights; of equals, the one met first."""
    experts = (tensor for tensor in tensors if tensor.role is Role.EXPERT)
    return type_of_most_weights((types[tensor.name], tensor.n_weights) for tensor in experts)


def file_type(main_type: QuantType) -> int:
    """general.file_type: llama.cpp's nearest name for a file that is mostly `main_type`."""
    return int(_FILE_TYPES[main_type.name])


def size_label(tensors: Sequence[SourceTensor]) -> str:
    """Parameters in short, `128x1.5B`, as llama.cpp's converter counts them."""
    total = sum(tensor.n_weights for tensor in tensors)
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
    in_experts = sum(tensor.n_weights for tensor in experts)
    n_experts = experts[0].n_experts if experts else 0
    per_expert = in_experts // n_experts if n_experts else 0
    return str(gguf.size_label(total, total - in_experts, per_expert, n_experts))


def add_general_keys(writer: GGUFWriter, checkpoint: Checkpoint, tensors: Sequence[SourceTensor], kind: str) -> None:
    """Add general.* keys, from the model card, the generation settings and the folder's name.

    Args:
        kind: general.type, `model` or `mmproj`.

    Raises:
        InputError: the model card's front matter or generation_config.json cannot be read.
    """
    about = read_model_card(checkpoint)
    about.quantized_by = QUANTIZED_BY
    about.size_label = about.size_label or size_label(tensors)
    about.base_models = [_base_model(checkpoint)]
    writer.add_type(kind)
    about.set_gguf_meta_model(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_base_keys(writer: GGUFWriter, checkpoint: Checkpoint, base: GgufHeader) -> None:
    """Add a base GGUF's keys, except those on its own weights' types, and the checkpoint as base model."""
    for key, value, value_types in copied_keys(base):
        writer.add_key_value(key, value, *map(GGUFValueType, value_types))
    about = _base_model(checkpoint)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, about["name"])
    if "repo_url" in about:
        writer.add_base_model_organization(0, about["organization"])
        writer.add_base_model_repo_url(0, about["repo_url"])
    writer.add_quantized_by(QUANTIZED_BY)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _base_model(checkpoint: Checkpoint) -> dict[str, str]:
    """general.base_model entry of the checkpoint itself."""
    entry = {"name": checkpoint.name}
    if checkpoint.repository:
        entry["organization"] = checkpoint.repository.partition("/")[0]
        entry["repo_url"] = f"https://huggingface.co/{checkpoint.repository}"
    return entry


def imatrix_keys(path: Path) -> Metadata:
    """quantize.imatrix.* for a model packed with the importance matrix in `path`, as llama-quantize writes them.

    Raises:
        InputError: the file is not an importance matrix.
    """
    header = read_imatrix_header(path)
    return {
        "quantize.imatrix.file": path.name,
        "quantize.imatrix.dataset": ", ".join(header.datasets),
        "quantize.imatrix.entries_count": header.n_entries,
        "quantize.imatrix.chunks_count": header.chunk_count,
    }

"""The table of model families that can be converted, and a checkpoint's GGUF tensors by its family.

A family is one module of data in `families/`, made of a text model (`text/`) and a vision tower (`vision/`); to add
one, write it and list it in `FAMILIES`.
"""

from mode_gguf.architectures.base_gguf.family import base_family, checkpoint_with_base
from mode_gguf.architectures.common_keys import Metadata, MetadataValue
from mode_gguf.architectures.families import (
    gemma4_moe,
    glm4v_moe,
    internvl,
    kimi_k25,
    kimi_vl,
    mistral4,
    qwen3_5_moe,
    qwen3_vl_moe,
)
from mode_gguf.architectures.family import ModelFamily
from mode_gguf.architectures.hparams import has_experts
from mode_gguf.architectures.source_tensors import check_all_used, ignored_prefixes, source_tensors
from mode_gguf.architectures.tensors import SourceTensor
from mode_gguf.architectures.tokenizer import Tokenizer
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

__all__ = [
    "FAMILIES",
    "TOKENIZERS",
    "Metadata",
    "MetadataValue",
    "ModelFamily",
    "checkpoint_with_base",
    "find_family",
    "ignored_tensors",
    "mtp_tensors",
    "projector_tensors",
    "text_tensors",
]

FAMILIES: tuple[ModelFamily, ...] = (
    qwen3_vl_moe.FAMILY,
    qwen3_5_moe.FAMILY,
    gemma4_moe.FAMILY,
    glm4v_moe.FAMILY,
    internvl.ORIGINAL,
    internvl.FAMILY,
    kimi_vl.FAMILY,
    kimi_k25.FAMILY,
    mistral4.FAMILY,
    mistral4.PARAMETERS,
)

TOKENIZERS: tuple[Tokenizer, ...] = tuple(dict.fromkeys(family.tokenizer for family in FAMILIES))
"""The tokenizers of all families."""


def find_family(checkpoint: Checkpoint) -> ModelFamily:
    """The family of a checkpoint, by the class config.json names; one made from its base GGUF where it has one.

    Raises:
        InputError: the model is dense, its class is not supported, or it has settings llama.cpp cannot run.
    """
    if checkpoint.base is not None:
        return base_family(checkpoint, checkpoint.base)
    classes = checkpoint.config.get("architectures")
    of_class = [family for family in FAMILIES if isinstance(classes, list) and family.hf_class in classes]
    if of_class:
        family = next((family for family in of_class if family.matches(checkpoint)), of_class[-1])
        family.check(checkpoint)
        return family
    if not has_experts(checkpoint.config):
        raise InputError(
            f"{checkpoint.path}: {classes} is not a Mixture-of-Experts model (no experts in config.json); "
            "use llama.cpp's own convert_hf_to_gguf.py and llama-quantize for dense models"
        )
    raise InputError(
        f"{checkpoint.path}: model class {classes} is not supported; "
        f"supported are {', '.join(dict.fromkeys(family.hf_class for family in FAMILIES))}; any other MoE model that "
        "llama.cpp converts can be given with --base-gguf"
    )


def ignored_tensors(checkpoint: Checkpoint) -> list[str]:
    """Tensors that its family leaves out of both files on purpose, such as blocks for multi-token prediction."""
    family = find_family(checkpoint)
    ignored = ignored_prefixes(family, family.ranges(checkpoint))
    return [name for name in checkpoint.tensors if name.startswith(ignored)]


def text_tensors(checkpoint: Checkpoint) -> list[SourceTensor]:
    """Tensors of the text model, in file order; nothing is read until `SourceTensor.read` is called.

    Raises:
        InputError: as `find_family`, and when a tensor is missing, misshapen, or has no place in the file.
    """
    if checkpoint.base is not None:
        return list(checkpoint.base.tensors)
    family = find_family(checkpoint)
    check_all_used(family, checkpoint)
    return source_tensors(family, family.text_rules, checkpoint)


def mtp_tensors(checkpoint: Checkpoint) -> list[SourceTensor]:
    """Tensors of the file that drafts by multi-token prediction; raises like `text_tensors`, and where there is none.

    Raises:
        InputError: the checkpoint has no such block, or llama.cpp cannot draft with that of its family.
    """
    family = find_family(checkpoint)
    if family.text.mtp is None:
        raise InputError(f"{checkpoint.path}: multi-token prediction of {family.hf_class} is not supported")
    block = ignored_tensors(checkpoint)
    if not block:
        raise InputError(
            f"{checkpoint.path}: no tensor's name begins with {' or '.join(family.ignored)}; these weights were "
            "published without a block for multi-token prediction"
        )
    tensors = source_tensors(family, family.mtp_rules(checkpoint), checkpoint)
    unknown = sorted(set(block) - {source for tensor in tensors for source in tensor.sources})
    if unknown:
        raise InputError(f"{checkpoint.path}: tensor {unknown[0]} has no place in a file for multi-token prediction")
    return tensors


def projector_tensors(checkpoint: Checkpoint) -> list[SourceTensor]:
    """Tensors of the projector, in file order, none of a text-only model; raises like `text_tensors`."""
    if checkpoint.base is not None:
        return list(checkpoint.base.projector_tensors)
    family = find_family(checkpoint)
    check_all_used(family, checkpoint)
    return source_tensors(family, family.projector_rules, checkpoint)

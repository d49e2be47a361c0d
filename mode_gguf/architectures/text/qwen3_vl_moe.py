"""The decoder of Qwen3-VL-MoE: llama.cpp's `qwen3vlmoe`, Qwen3's with positions in three directions and DeepStack."""

from functools import partial

from gguf import Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

from mode_gguf.architectures.common_keys import EXPERTS, HEADS, SIZES, Metadata, common_text_keys, head_dim
from mode_gguf.architectures.experts import Projection, fused_experts, fused_shape
from mode_gguf.architectures.family import TextModel
from mode_gguf.architectures.hparams import Hparams, text_hparams, vision_hparams
from mode_gguf.architectures.rope import check_sections, mrope_sections, rope_hparams, scaling_keys
from mode_gguf.architectures.rules import View, refuse_shape
from mode_gguf.architectures.text import qwen3_moe
from mode_gguf.architectures.vision.qwen import deepstack_taps
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.QWEN3VLMOE]


def experts_either_way(checkpoint: Checkpoint, source: str, projection: Projection) -> View:
    """One projection of the fused experts as (E, rows, n_in), whichever way the checkpoint lays them out.

    H is the hidden size, I the width of an expert, E their number. Checkpoints on the hubs store `x @ W`: gate_up_proj
    (E, H, 2I) and down_proj (E, I, H). A re-save by transformers 5 stores `W @ x`: (E, 2I, H) and (E, H, I).

    Raises:
        InputError: the shape is neither, or both and the configuration does not say who saved it.
    """
    experts, rows, n_in = fused_shape(checkpoint, projection)
    shape = checkpoint.shape(source)
    swapped = shape == (experts, n_in, rows)
    if not swapped and shape != (experts, rows, n_in):
        refuse_shape(checkpoint, source, f"{[experts, n_in, rows]} or {[experts, rows, n_in]}")
    if rows == n_in:
        swapped = not _saved_by_transformers_5(checkpoint, source)
    return fused_experts(checkpoint, source, projection, transposed=swapped)


def _saved_by_transformers_5(checkpoint: Checkpoint, source: str) -> bool:
    """Whether transformers 5 saved square matrices, whose layout no shape tells apart."""
    version = str(checkpoint.config.get("transformers_version", ""))
    major = version.partition(".")[0]
    if not major.isdecimal():
        raise InputError(
            f"{checkpoint.path / 'config.json'}: transformers_version is missing, and the square experts of {source} "
            "may be stored either way; use the configuration published with the model"
        )
    return int(major) >= 5


def _keys(text: Hparams) -> Metadata:
    rope = rope_hparams(text)
    return {
        **common_text_keys(text, *SIZES, Keys.LLM.FEED_FORWARD_LENGTH, *HEADS, Keys.Attention.LAYERNORM_RMS_EPS),
        Keys.Rope.DIMENSION_SECTIONS: mrope_sections(rope),
        Keys.Rope.FREQ_BASE: rope.float("rope_theta"),
        **scaling_keys(rope),
        **common_text_keys(text, *EXPERTS),
        Keys.LLM.NUM_DEEPSTACK_LAYERS: len(deepstack_taps(vision_hparams(text.checkpoint))),
    }


def _check(text: Hparams) -> None:
    """Refuse what llama.cpp runs with one value only, with an `InputError`."""
    qwen3_moe.check(text)
    check_sections(rope_hparams(text), head_dim(text), interleaved=True)


TEXT_MODEL = TextModel(
    GGUF_ARCH,
    hparams=partial(text_hparams, reader=GGUF_ARCH),
    rules=qwen3_moe.rules(experts_either_way),
    keys=_keys,
    check=_check,
)

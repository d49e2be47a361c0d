"""What the conformance tests know about a model family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from tests.families.refusal import Refusal

GgufTensors: TypeAlias = Mapping[str, Role]
"""Names of a block's tensors, less `blk.N.`, and what may happen to them."""

Converted: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""From a checkpoint's tensor to what llama.cpp has of it: written down a second time, for the tests."""

Asked: TypeAlias = tuple[list[int], dict[str, Tensor]]
"""Tokens of a prompt with a picture, and what transformers' forward takes of the picture."""


def weights(text: str) -> tuple[str, ...]:
    """GGUF names: `a` for a.weight, `a.*` for a.weight and a.bias, `a=` for a as it is."""
    found: list[str] = []
    for name in text.split():
        stem = name.rstrip(".*=")
        found += [stem] if name.endswith("=") else [f"{stem}.weight"]
        found += [f"{stem}.bias"] if name.endswith(".*") else []
    return tuple(found)


def block(*, dense: str, keep: str, absorbed: str = "", experts: str = "gate up down") -> dict[str, Role]:
    """A decoder layer's tensors by role; of `experts` the projections."""
    roles = {Role.DENSE: dense, Role.KEEP: keep, Role.ABSORBED: absorbed}
    found = {name: role for role, text in roles.items() for name in weights(text)}
    return found | {f"ffn_{projection}_exps.weight": Role.EXPERT for projection in experts.split()}


@dataclass(frozen=True)
class Change:
    """A checkpoint with other settings in a section of config.json, None for the outermost; a value None removes one.

    Attributes:
        name: in the test's id.
        text: keys of the text model's metadata, as in `FamilyCase.text_keys`; None where none differs from the
            unchanged checkpoint's.
        projector: those of the projector.
    """

    name: str
    section: str | None
    settings: Mapping[str, Any]
    text: Mapping[str, Any] | None = None
    projector: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class StockDifference:
    """A difference between our files and those of llama.cpp's converter, undone to show that it matters.

    Attributes:
        name: in the test's id.
        file: `text` or `mmproj`.
        left_out: keys and tensors that it does not write.
        rewritten: tensors that it writes with other values, by patterns of their names.
        kl: what the mean KL then exceeds, in nats.
        unharmed: positions at the beginning that do not notice.
    """

    name: str
    file: str
    kl: float
    left_out: tuple[str, ...] = ()
    rewritten: Mapping[str, Converted] = field(default_factory=dict)
    unharmed: int = 0


@dataclass(frozen=True)
class MeasuredChange:
    """Tensors whose change to Q8_0 is measured, and how near the measurements come to the whole model's KL.

    Attributes:
        names: GGUF tensors.
        samples: numbers of samples: texts first, then pictures.
        options: of the builder, where the pico checkpoint's own would send tokens to other experts for the change,
            which no gradient sees.
        rtol: of the KL that is run.
        draws: of labels, for gradients.
        fisher: bounds of what gradients predict, over that KL.
        reroutes: tensors and kinds of samples for which a token does go elsewhere: bounds do not hold.
    """

    names: tuple[str, ...]
    samples: tuple[int, ...] = (0, 1)
    options: Mapping[str, Any] = field(default_factory=dict)
    rtol: float = 2e-3
    draws: int = 16
    fisher: tuple[float, float] = (0.5, 2.0)
    reroutes: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True)
class Conversion:
    """Options of `convert` on the command line, and what must come of them.

    Attributes:
        bpw: the budget in bits per weight.
        options: others.
        reached: how much of it is used at least.
        log: what it says on the way.
        f32: tensors that stay as they are.
        quantized: tensors that do not.
        among: a tensor, and the types it may have, as its rows fit no others.
        alone: another test module runs it.
    """

    bpw: float
    options: tuple[str, ...]
    reached: float = 0.995
    log: str = ""
    f32: str = ""
    quantized: str = ""
    among: tuple[str, str] | None = None
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class FamilyCase:
    """A model family; `pico`'s constants LAYERS, EXPERTS, TOP_K, WIDTH and HIDDEN are its sizes.

    Attributes:
        name: in test ids.
        pico: module of the builder.
        write: the builder.
        layouts: fixtures of checkpoints with the same weights; the published layout first.
        transformers_layout: fixture of one that transformers opens itself, where that is not the first.
        tied: whether its embeddings may be tied.
        gguf_arch, projector_type: what the family says of itself.
        load: from a folder and a checkpoint of the case to transformers' model in F32.
        outside: the text model's tensors outside the layers.
        layers: those of each layer.
        vision: the projector's outside its blocks.
        vision_block: those of each block.
        vision_blocks: their number.
        parameters: transformers' parameters of GGUF tensors, `{n}` for a layer or block; others are found by the
            checkpoint's names.
        converted: from a checkpoint tensor to the GGUF tensor, by patterns of GGUF names; others are as stored, and a
            None is tested elsewhere.
        text_keys: metadata without the architecture's name before it; a None must be missing.
        projector_keys: metadata without `clip.` before it.
        changes: other spellings of the settings, and other settings.
        pre_tokenizer: tokenizer.ggml.pre.
        image_token: stands for a piece of a picture.
        marks: what comes before and behind the pieces.
        image_tokens: per picture of the calibration samples.
        streamed_atol: largest difference of a streamed model's logits.
        sums_rtol: of the sums over what dense matrices read.
        activation: of the experts.
        attention_from: the first layer that chooses key tokens; all image tokens count as such before it.
        ask: the question about a picture in tokens and tensors, as transformers takes it.
        before_question: what the model's authors write between picture and question.
        token_types: whether transformers is told which tokens are an image's.
        pictures: sizes of pictures that no implementation scales, and others that all scale alike.
        text_repeats: how often the text is repeated, to exceed `text_length` tokens.
        text_kl: largest KL of llama.cpp's predictions against transformers', in nats.
        image_kl: KL of an answer about a picture, on average.
        image_average: a median where a router's choice hangs on rounding.
        rounded: makes transformers round as llama.cpp's vision tower does; None where that was not taken apart.
        rounded_kl: largest KL that is left then.
        stock: what llama.cpp's converter writes otherwise.
    """

    name: str
    pico: ModuleType
    write: Callable[..., Path]
    layouts: tuple[str, ...]
    transformers_layout: str = ""
    tied: bool = False
    gguf_arch: str
    projector_type: str
    load: Callable[[Path, Checkpoint], Any] = lambda folder, checkpoint: AutoModelForImageTextToText.from_pretrained(
        folder, dtype="float32"
    ).eval()

    outside: GgufTensors
    layers: tuple[GgufTensors, ...]
    vision: tuple[str, ...]
    vision_block: tuple[str, ...]
    vision_blocks: int = 3
    parameters: Mapping[str, str] = field(default_factory=dict)
    converted: Mapping[str, Converted | None] = field(default_factory=dict)
    text_keys: Mapping[str, Any]
    projector_keys: Mapping[str, Any]
    changes: tuple[Change, ...] = ()
    pre_tokenizer: str

    image_token: str
    marks: tuple[str, str]
    image_tokens: tuple[int, ...]
    streamed_atol: float = 1e-4
    sums_rtol: float = 1e-3
    activation: Callable[[Tensor], Tensor] = silu
    attention_from: int = 0

    ask: Callable[[Any, Image.Image], Asked]
    before_question: str = ""
    token_types: bool = False
    pictures: tuple[tuple[int, int], ...] = ((128, 96),)
    text_repeats: int = 3
    text_length: int = 100
    text_kl: float = 1e-8
    image_kl: float = 1e-6
    image_average: Callable[[np.ndarray], Any] = np.mean
    rounded: Callable[[nn.Module], None] | None = None
    rounded_kl: float = 1e-7
    stock: tuple[StockDifference, ...] = ()

    measured: MeasuredChange | None = None
    conversion: Conversion | None = None
    refusals: tuple[Refusal, ...]

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer, names in enumerate(self.layers) if Role.EXPERT in names.values()]

"""Model families: a text model, a vision tower, a layout of names, and a tokenizer that go together."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from mode_gguf.architectures.common_keys import Metadata, text_ranges, vision_ranges
from mode_gguf.architectures.hparams import Hparams, config, text_hparams
from mode_gguf.architectures.images import ImagePlace, ImageSize, PlacedImage, image_token_id
from mode_gguf.architectures.rules import EMBEDDING, OUTPUT, Ranges, TensorRule
from mode_gguf.architectures.tensors import Array
from mode_gguf.architectures.tokenizer import Tokenizer
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.gpu_memory.model_graphs import ModelGraphs

log = logging.getLogger(__name__)

PLAIN_SIZE: ImageSize = (448, 224)
"""A multiple of most towers' patches and merged patches, and as large as their smallest pictures."""


def says_tied(checkpoint: Checkpoint, default: bool = False) -> bool:
    """Whether config.json says that the output head is the token embedding: transformers reads the outermost setting.

    Args:
        default: transformers' value of a setting that is absent.

    Raises:
        InputError: the setting is neither true nor false.
    """
    settings = config(checkpoint, {"tie_word_embeddings": default})
    return settings.has("tie_word_embeddings") and settings.bool("tie_word_embeddings")


def says_tied_at_either_level(checkpoint: Checkpoint) -> bool:
    """Whether config.json says so for the model or for its text model; raises like `says_tied`."""
    return says_tied(checkpoint) or bool(text_hparams(checkpoint).get("tie_word_embeddings", False))


def no_parameter(checkpoint: Checkpoint, parameter: str) -> Array | None:
    """The answer for checkpoints that store every parameter as one tensor."""
    return None


@dataclass(frozen=True, slots=True)
class MtpBlock:
    """A block for multi-token prediction that llama.cpp can draft with, in a file of its own.

    Attributes:
        rules: tensors of that file, without placeholders.
        keys: its keys beyond general.* and tokenizer.*, with `{arch}` for the architecture.
    """

    rules: Callable[[Hparams], tuple[TensorRule, ...]]
    keys: Callable[[Hparams], Metadata]


@dataclass(frozen=True, slots=True)
class TextModel:
    """A decoder that llama.cpp runs.

    Attributes:
        gguf_arch: general.architecture.
        hparams: its hyperparameters (`hparams.text_hparams`), which the others are given.
        rules: its tensors, in file order.
        keys: its keys beyond general.* and tokenizer.*, with `{arch}` for the architecture.
        check: refuses, with `InputError`, checkpoints that llama.cpp would run differently.
        ranges: values of the rules' placeholders.
        mtp: what it can draft with.
    """

    gguf_arch: str
    hparams: Callable[[Checkpoint], Hparams]
    rules: tuple[TensorRule, ...]
    keys: Callable[[Hparams], Metadata]
    check: Callable[[Hparams], None]
    ranges: Callable[[Hparams], Ranges] = text_ranges
    mtp: MtpBlock | None = None


@dataclass(frozen=True, slots=True)
class VisionTower:
    """A vision tower with its projector that llama.cpp's mtmd runs, and how an image takes its place in a prompt.

    Attributes:
        projector_type: clip.projector_type; empty for text-only models.
        hparams: its hyperparameters (`hparams.vision_hparams`), which the next ones are given.
        rules: its tensors, in file order.
        keys: clip.* keys.
        check: refuses, with `InputError`, checkpoints that llama.cpp would run differently.
        place_image: an image as the model takes it.
        ranges: values of the rules' placeholders.
        needs_processor: whether that takes transformers' image processor.
        image_tokens: how many tokens stand for an image of some size, or at most; None where each stands for as large a
            part of any image.
        image_token: id of the token that stands for a piece of an image.
        placeholder: what the chat template writes for an image, or, where it knows only text, what is written into the
            text; None for the image token.
        plain_size: of a picture that neither transformers nor llama.cpp scales, nor interpolates positions for where
            the two do it differently; not square if possible, so that swapped sides show.
        token_types: argument of the model's forward that is 1 at image tokens and 0 elsewhere; None if it takes none.
    """

    projector_type: str
    hparams: Callable[[Checkpoint], Hparams]
    rules: tuple[TensorRule, ...]
    keys: Callable[[Hparams], Metadata]
    check: Callable[[Hparams], None]
    place_image: Callable[[ImagePlace], PlacedImage]
    ranges: Callable[[Hparams], Ranges] = vision_ranges
    needs_processor: bool = True
    image_tokens: Callable[[Checkpoint, ImageSize | None], int] | None = None
    image_token: Callable[[Checkpoint], int] = image_token_id
    placeholder: str | None = None
    plain_size: Callable[[Checkpoint], ImageSize] = lambda checkpoint: PLAIN_SIZE
    token_types: str | None = "mm_token_type_ids"


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a family's checkpoints, where it differs from the one that transformers holds.

    Attributes:
        renames: patterns in the names of transformers' parameters, and what they are replaced with in those of the
            checkpoint's tensors, one after the other.
        read_parameter: reads a parameter outside the decoder layers that is not one tensor as it is, by its name in
            transformers; None for those that are.
        model_config: what transformers' configuration is made of.
        tied: whether config.json says that the output head is the token embedding (see `ties_head`).
    """

    renames: tuple[tuple[str, str], ...] = ()
    read_parameter: Callable[[Checkpoint, str], Array | None] = no_parameter
    model_config: Callable[[Checkpoint], Mapping[str, Any]] = attrgetter("config")
    tied: Callable[[Checkpoint], bool] = says_tied

    def ties_head(self, checkpoint: Checkpoint) -> bool:
        """Whether the output head is the token embedding: config.json says so, and no other head is stored.

        transformers 5 does not tie, either, what is stored with different values.
        """
        if not self.tied(checkpoint):
            return False
        head, embedding = self.stored_name(OUTPUT.source), self.stored_name(EMBEDDING.source)
        if head not in checkpoint.tensors or embedding not in checkpoint.tensors:
            return True
        tied = checkpoint.equal(head, embedding)
        if not tied and checkpoint.config.get("tie_word_embeddings"):  # said, not just transformers' default
            _report_head(checkpoint.path, head)
        return tied

    def stored_name(self, parameter: str) -> str:
        """The checkpoint's name of a parameter of transformers' model, or of a rule with placeholders."""
        for pattern, replacement in self.renames:
            parameter = re.sub(pattern, replacement, parameter)
        return parameter

    def renamed(self, rule: TensorRule) -> TensorRule:
        """A rule under the checkpoint's names."""
        each = rule.each and self.stored_name(rule.each)
        return replace(rule, source=self.stored_name(rule.source), each=each)


@cache
def _report_head(path: Path, head: str) -> None:
    """Log, once, that a head is written although config.json says that there is none."""
    log.warning(
        "%s: config.json says that embeddings are tied, but %s is stored and differs; it is kept, as in transformers",
        path,
        head,
    )


SAVED: tuple[tuple[str, str], ...] = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)
"""Renames of checkpoints with the names that transformers 4 gave to vision-language models, and still saves."""


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """A model family: everything that differs between the models that can be converted.

    Attributes:
        hf_class: transformers' class, as `architectures` in config.json names it.
        text: the text model.
        vision: the vision tower.
        tokenizer: what the text model reads.
        layout: of its checkpoints.
        ignored: beginnings of transformers' names of tensors that are left out on purpose; placeholders as in rules.
        memory_graphs: the graphs that llama.cpp computes; None where the memory they take is not known.
    """

    hf_class: str
    text: TextModel
    vision: VisionTower
    tokenizer: Tokenizer
    layout: Layout = Layout()
    ignored: tuple[str, ...] = ()
    memory_graphs: ModelGraphs | None = None

    @property
    def gguf_arch(self) -> str:
        """general.architecture of the text model."""
        return self.text.gguf_arch

    @property
    def projector_type(self) -> str:
        """clip.projector_type; empty for text-only models."""
        return self.vision.projector_type

    @property
    def text_rules(self) -> tuple[TensorRule, ...]:
        """Tensors of the text model under the checkpoint's names."""
        return tuple(map(self.layout.renamed, self.text.rules))

    def mtp_rules(self, checkpoint: Checkpoint) -> tuple[TensorRule, ...]:
        """Tensors of the file that drafts by multi-token prediction; none where the text model cannot."""
        mtp = self.text.mtp
        return tuple(map(self.layout.renamed, mtp.rules(self.text.hparams(checkpoint)))) if mtp else ()

    @property
    def projector_rules(self) -> tuple[TensorRule, ...]:
        """Tensors of the projector under the checkpoint's names."""
        return tuple(map(self.layout.renamed, self.vision.rules))

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint of the class is in this family's layout: its token embedding has the name."""
        return self.layout.stored_name(EMBEDDING.source) in checkpoint.tensors

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that llama.cpp would run differently, with an `InputError`."""
        self.text.check(self.text.hparams(checkpoint))
        self.vision.check(self.vision.hparams(checkpoint))

    def ranges(self, checkpoint: Checkpoint) -> Ranges:
        """Values of the placeholders in all rules."""
        text, vision = self.text.hparams(checkpoint), self.vision.hparams(checkpoint)
        return {**self.text.ranges(text), **self.vision.ranges(vision)}

    def text_metadata(self, checkpoint: Checkpoint) -> Metadata:
        """Keys of the text model's file beyond general.* and tokenizer.*."""
        return self._with_architecture(self.text.keys(self.text.hparams(checkpoint)))

    def mtp_metadata(self, checkpoint: Checkpoint) -> Metadata:
        """Keys of the file that drafts by multi-token prediction; none where the text model cannot."""
        mtp = self.text.mtp
        return self._with_architecture(mtp.keys(self.text.hparams(checkpoint))) if mtp else {}

    def projector_metadata(self, checkpoint: Checkpoint) -> Metadata:
        """clip.* keys of the projector's file."""
        return self.vision.keys(self.vision.hparams(checkpoint))

    def _with_architecture(self, keys: Metadata) -> Metadata:
        return {key.replace("{arch}", self.gguf_arch): value for key, value in keys.items()}

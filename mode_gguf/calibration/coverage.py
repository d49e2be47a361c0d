"""Coverage of a calibration: experts without tokens, modalities without samples, and warnings with the way out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mode_gguf.forward.modality import KEY_VISION, MODALITIES, TEXT

if TYPE_CHECKING:  # the statistics write these warnings into their file
    from mode_gguf.calibration.statistics import CalibrationStatistics

MIN_TOKENS_PER_EXPERT = 32
"""Routed text and key vision tokens below which an expert counts as rarely routed. A mean of squares over 32 tokens is
off by a quarter, sqrt(2 / 32), even where they are normally distributed, and it is where the Fisher importance trusts
the layer's mean as much as the expert's own (`fisher_imatrix.PRIOR_TOKENS`)."""

MAX_RARELY_ROUTED = 0.05
"""Share of the experts that may be rarely routed without a warning."""

_MAX_LAYER_WARNINGS = 6
"""Maximum number of warnings about single layers; beyond it, each modality gets one in all."""


@dataclass(frozen=True, slots=True)
class LayerCoverage:
    """Experts of one layer that no token of a modality was routed to; a modality without tokens is left out."""

    layer: int
    n_experts: int
    never_routed: Mapping[str, tuple[int, ...]]


def calibration_warnings(statistics: "CalibrationStatistics") -> list[str]:
    """Warnings about gaps in the statistics, one sentence each; empty where nothing is missing."""
    return [
        *_unknown_modalities(statistics),
        *_missing_modalities(statistics),
        *_rarely_routed(statistics),
        *_never_routed(statistics),
    ]


def rarely_routed_experts(statistics: "CalibrationStatistics") -> np.ndarray:
    """Whether fewer than `MIN_TOKENS_PER_EXPERT` tokens reached each expert: bool, all layers' experts in order."""
    tokens = [statistics.counts(layer)[[TEXT, KEY_VISION]].sum(axis=0) for layer in statistics.moe_layers]
    return np.concatenate(tokens) < MIN_TOKENS_PER_EXPERT if tokens else np.zeros(0, bool)


def _unknown_modalities(statistics: "CalibrationStatistics") -> Iterator[str]:
    if statistics.imatrix:
        yield (
            f"statistics are those of the importance matrix {statistics.imatrix}, which does not tell text from image "
            "tokens: bits go where its tokens need them, whatever they were, and costs are errors of outputs, not "
            "of the model's answers"
        )


def _missing_modalities(statistics: "CalibrationStatistics") -> Iterator[str]:
    samples = statistics.samples
    if statistics.imatrix or not statistics.has_vision:
        return
    if not samples.image_samples:
        yield (
            "calibration saw no image: bits go where text needs them, and answers about images may suffer; "
            "add samples with an image"
        )
    elif not samples.vision_tokens:
        yield (
            f"calibration saw no vision token in its {samples.image_samples} samples with an image; "
            "check the pictures and the checkpoint's image processor"
        )
    if not samples.text_samples:
        yield (
            "calibration saw no sample without an image: bits go where answers about images need them, and plain text "
            "may suffer; add text samples"
        )


def _rarely_routed(statistics: "CalibrationStatistics") -> Iterator[str]:
    is_rare = rarely_routed_experts(statistics)
    if len(is_rare) and (share := float(is_rare.mean())) > MAX_RARELY_ROUTED:
        samples = statistics.samples
        if statistics.imatrix:
            yield (
                f"{100 * share:.1f} % of the {len(is_rare):,} experts saw fewer than {MIN_TOKENS_PER_EXPERT} tokens; "
                "measure the importance matrix on more or more varied samples"
            )
            return
        yield (
            f"{100 * share:.1f} % of the {len(is_rare):,} experts saw fewer than {MIN_TOKENS_PER_EXPERT} text and key "
            f"vision tokens in {samples.text_samples} text and {samples.image_samples} image samples; "
            "calibrate on more or more varied samples"
        )


def _never_routed(statistics: "CalibrationStatistics") -> Iterator[str]:
    """Warnings per layer and modality where those are few, else one per modality."""
    coverage = statistics.coverage()

    def modality_prefix(modality: str) -> str:
        return "" if statistics.imatrix else modality.replace("_", " ") + " "

    unreached = [
        (layer, modality, experts) for layer in coverage for modality, experts in layer.never_routed.items() if experts
    ]
    if len(unreached) <= _MAX_LAYER_WARNINGS:
        for layer, modality, experts in unreached:
            yield (
                f"layer {layer.layer}: no {modality_prefix(modality)}token reached "
                f"{'expert' if len(experts) == 1 else 'experts'} {', '.join(map(str, experts))} of {layer.n_experts}; "
                "the layer's mean stands in"
            )
        return
    n_experts = sum(layer.n_experts for layer in coverage)
    for modality in MODALITIES:
        n_unreached = [len(experts) for _, name, experts in unreached if name == modality]
        if n_unreached:
            yield (
                f"no {modality_prefix(modality)}token reached {sum(n_unreached):,} of {n_experts:,} experts, in "
                f"{len(n_unreached)} of {len(coverage)} layers; the layer's mean stands in"
            )

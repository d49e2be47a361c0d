"""What calibration did not see: experts without tokens, modalities without samples, and what to do about it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mode_gguf.forward.modality import KEY_VISION, MODALITIES, TEXT

if TYPE_CHECKING:  # the statistics write these warnings into their file
    from mode_gguf.calibration.statistics import CalibrationStatistics

MIN_TOKENS_PER_EXPERT = 32
"""Routed text and key vision tokens below which an expert counts as hardly seen. A mean of squares over 32 tokens is
off by a quarter, sqrt(2 / 32), even where they are normally distributed, and it is where the Fisher importance trusts
the layer's mean as much as the expert's own (`fisher_imatrix.PRIOR_TOKENS`)."""

MAX_HARDLY_SEEN = 0.05
"""Share of the experts that may be hardly seen without a warning."""

_FEW = 6
"""Most lines about single layers; where there would be more, each modality gets one line in all."""


@dataclass(frozen=True, slots=True)
class LayerCoverage:
    """Experts of one layer that no token of a modality was routed to; a modality without tokens is left out."""

    layer: int
    n_experts: int
    never_routed: Mapping[str, tuple[int, ...]]


def calibration_warnings(statistics: "CalibrationStatistics") -> list[str]:
    """What whoever relies on these statistics should know, one sentence each; empty where nothing is missing."""
    return [
        *_blind(statistics),
        *_missing_modalities(statistics),
        *_rarely_routed(statistics),
        *_never_routed(statistics),
    ]


def rarely_routed_experts(statistics: "CalibrationStatistics") -> np.ndarray:
    """bool, all experts of all layers in order: whether fewer than `MIN_TOKENS_PER_EXPERT` tokens reached each."""
    tokens = [statistics.counts(layer)[[TEXT, KEY_VISION]].sum(axis=0) for layer in statistics.moe_layers]
    return np.concatenate(tokens) < MIN_TOKENS_PER_EXPERT if tokens else np.zeros(0, bool)


def _blind(statistics: "CalibrationStatistics") -> Iterator[str]:
    if statistics.imatrix:
        yield (
            f"statistics are those of the importance matrix {statistics.imatrix}, which does not tell text from image "
            "tokens: bits go where its tokens need them, whatever they were, and costs are errors of outputs, not "
            "of the model's answers"
        )


def _missing_modalities(statistics: "CalibrationStatistics") -> Iterator[str]:
    shown = statistics.samples
    if statistics.imatrix or not statistics.has_vision:
        return
    if not shown.image_samples:
        yield (
            "calibration saw no image: bits go where text needs them, and answers about images may suffer; "
            "add samples with an image"
        )
    elif not shown.vision_tokens:
        yield (
            f"calibration saw no vision token in its {shown.image_samples} samples with an image; "
            "check the pictures and the checkpoint's image processor"
        )
    if not shown.text_samples:
        yield (
            "calibration saw no sample without an image: bits go where answers about images need them, and plain text "
            "may suffer; add text samples"
        )


def _rarely_routed(statistics: "CalibrationStatistics") -> Iterator[str]:
    hardly = rarely_routed_experts(statistics)
    if len(hardly) and (share := float(hardly.mean())) > MAX_HARDLY_SEEN:
        shown = statistics.samples
        if statistics.imatrix:
            yield (
                f"{100 * share:.1f} % of the {len(hardly):,} experts saw fewer than {MIN_TOKENS_PER_EXPERT} tokens; "
                "measure the importance matrix on more or more varied samples"
            )
            return
        yield (
            f"{100 * share:.1f} % of the {len(hardly):,} experts saw fewer than {MIN_TOKENS_PER_EXPERT} text and key "
            f"vision tokens in {shown.text_samples} text and {shown.image_samples} image samples; "
            "calibrate on more or more varied samples"
        )


def _never_routed(statistics: "CalibrationStatistics") -> Iterator[str]:
    """A line per layer and modality where that makes few, else a line per modality."""
    coverage = statistics.coverage()

    def spelled(modality: str) -> str:
        return "" if statistics.imatrix else modality.replace("_", " ") + " "

    gaps = [
        (layer, modality, experts) for layer in coverage for modality, experts in layer.never_routed.items() if experts
    ]
    if len(gaps) <= _FEW:
        for layer, modality, experts in gaps:
            yield (
                f"layer {layer.layer}: no {spelled(modality)}token reached "
                f"{'expert' if len(experts) == 1 else 'experts'} {', '.join(map(str, experts))} of {layer.n_experts}; "
                "the layer's mean stands in"
            )
        return
    n_experts = sum(layer.n_experts for layer in coverage)
    for modality in MODALITIES:
        unreached = [len(experts) for _, name, experts in gaps if name == modality]
        if unreached:
            yield (
                f"no {spelled(modality)}token reached {sum(unreached):,} of {n_experts:,} experts, in "
                f"{len(unreached)} of {len(coverage)} layers; the layer's mean stands in"
            )

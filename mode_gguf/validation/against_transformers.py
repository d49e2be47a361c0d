"""The exported files in llama.cpp against what transformers makes of the checkpoint.

A quantized file and the full-precision one it is judged by are both written here, so a fault of the export is in both,
and they agree. The probes are not: calibration has run them in transformers. Tokens and the chat template must be
equal; predictions are compared by the median KL divergence over a prompt's last positions. It is deaf to a router's
choice that hangs on rounding, which throws single positions as far off as a fault does, and hears a fault of the
model's weights or settings, which shows at most positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.llama_cpp.chat_template import ChatTemplate
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.probes import Probe, Probes
from mode_gguf.validation.divergence import Scores, compare
from mode_gguf.validation.reference import RunSettings
from mode_gguf.validation.report import AgainstTransformers, ProbeDistance

KL_BOUNDS: Final[Mapping[str, float]] = {"float32": 0.01, "bfloat16": 0.03}
"""Largest median KL of a prompt in nats, by what transformers computed in; measured in docs/design/validation.md."""

_PARTS: Final = ("a question", "the end of an answer")
_QUESTION: Final = "Which rivers of Europe are longer than 1000 km?"
_WAY_OUT: Final = (
    "nothing was judged by it; compare the checkpoint's files with those that were published with these weights, and "
    "report it if they are alike (--no-validate writes files without this check)"
)


def compare_with_transformers(
    probes: Probes, model: Path, mmproj: Path | None, settings: RunSettings, *, predictions: bool
) -> AgainstTransformers:
    """Run the probes on a file in llama.cpp.

    Args:
        model: the text model; in full precision for `predictions`.
        mmproj: the projector; without it pictures are left out.
        settings: how it is run, but for exactness and as much context as the probes take.
        predictions: whether predictions are compared, too; else tokens and the chat template alone.

    Raises:
        ValidationError: a file differs from what transformers makes of the checkpoint; names the likely stage.
        InputError: a file cannot be used.
    """
    context = max([settings.context, *(len(probe.tokens) + 1 for probe in probes.probes)])
    settings = replace(settings, exact=True, context=context)
    with settings.load(model, mmproj if predictions else None) as loaded:
        comparison = _Comparison(probes, loaded)
        tokens, template = comparison.check_tokens(), comparison.check_template()
        text = comparison.check_texts() if predictions else None
        image = comparison.check_pictures() if predictions and mmproj else None
    return AgainstTransformers(
        file=model.name,
        dtype=probes.dtype,
        kl_bound=comparison.bound if predictions else None,
        tokens=tokens,
        chat_template=template,
        text=text,
        image=image,
        warnings=tuple(comparison.warnings),
    )


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The probes beside a loaded model."""

    probes: Probes
    model: LlamaModel
    warnings: list[str] = field(default_factory=list)
    """Differences of what a base GGUF brings and nobody here has written."""

    @property
    def bound(self) -> float:
        return KL_BOUNDS.get(self.probes.dtype, max(KL_BOUNDS.values()))

    def check_tokens(self) -> int:
        """Number of tokens that are the same: of all probes without a picture, and the special ones."""
        for text, number in self.probes.special_tokens.items():
            if (found := self.model.tokenize(text)) != [number]:
                self._differs(
                    "tokenizer",
                    f"the special token {text!r} is {number} in transformers, {found} here",
                    own=not self.probes.from_base,
                )
        of_prompts = sum(self._same_tokens(probe) for probe in self.probes.probes if probe.picture is None)
        return of_prompts + len(self.probes.special_tokens)

    def check_template(self) -> bool:
        """Whether the template renders as transformers' does; both are rendered now, as one may write the date."""
        chat = self.probes.chat
        if chat is None:
            return False
        found = _rendered(lambda: self.model.chat_template)
        expected = [
            _rendered(partial(ChatTemplate, source, chat.bos, chat.eos, "the checkpoint's template"))
            for source in chat.templates
        ]
        if found in expected:
            return True
        what, wanted, here = next(
            (what, wanted, here)
            for what, wanted, here in zip(_PARTS, expected[0], found, strict=True)
            if here != wanted
        )
        start = _agreement(wanted, here)
        self._differs(
            "chat template",
            f"it writes {what} as {_excerpt(here, start)}, the one that transformers takes as "
            f"{_excerpt(wanted, start)}",
            own=not self.probes.from_base,
        )
        return False

    def check_texts(self) -> ProbeDistance | None:
        """Distance of the predictions behind texts and a chat."""
        return self._distance("text model (its tensors or its hyperparameters)", with_picture=False, own=True)

    def check_pictures(self) -> ProbeDistance | None:
        """Distance of the predictions behind a question about a picture."""
        own = not self.probes.from_base
        for probe in self.probes.probes:
            if probe.picture is None or probe.place is None:
                continue
            wanted, found = probe.place[1] - probe.place[0], self.model.image_tokens(Image.fromarray(probe.picture))
            if wanted != found:
                height, width, _ = probe.picture.shape
                self._differs(
                    "image preprocessing",
                    f"a picture of {width} x {height} pixels takes {found} tokens, {wanted} in transformers",
                    own=own,
                )
                return None
        stage = "projector or image preprocessing (such as mean and standard deviation)"
        return self._distance(stage, with_picture=True, own=own)

    def _same_tokens(self, probe: Probe) -> int:
        wanted, found = list(probe.tokens[probe.beginning :]), self.model.tokenize(probe.text)
        own = not self.probes.from_base
        if wanted != found:
            at = _agreement(wanted, found)
            behind = self.model.detokenize(found[:at])[-16:]
            self._differs(
                "tokenizer",
                f"of the prompt {probe.name!r} it makes {len(found)} tokens, transformers {len(wanted)}, and behind "
                f"{behind!r} they part: {_token(found, at)} here, {_token(wanted, at)} there",
                own=own,
            )
        beginning = list(probe.tokens[: probe.beginning])
        # A chat template writes its own beginning, and llama.cpp can put no more than one token ahead of a text.
        if not probe.is_chat and len(beginning) <= 1 and beginning != self.model.beginning:
            here, there = self.model.beginning or "no token", beginning or "none"
            self._differs("tokenizer", f"it begins a text with {here}, transformers with {there}", own=own)
        return len(wanted)

    def _distance(self, stage: str, *, with_picture: bool, own: bool) -> ProbeDistance | None:
        scores: list[Scores] = []
        medians: list[float] = []
        for probe in self.probes.probes:
            if (probe.picture is not None) != with_picture:
                continue
            scores.append(self._scores(probe))
            medians.append(float(np.median(scores[-1].kl)))
            if not medians[-1] <= self.bound:
                self._differs(
                    stage,
                    f"of the prompt {probe.name!r} its predictions are {medians[-1]:.3g} nats (median KL) from those "
                    f"of transformers in {self.probes.dtype}, at most {self.bound:g} expected",
                    own=own,
                )
        if not scores:
            return None
        joined = Scores.joined(scores)
        return ProbeDistance(
            positions=len(joined.kl),
            kl_median=max(medians),
            kl_mean=float(joined.kl.mean()),
            top1_agreement=float(joined.same_top1.mean()),
        )

    def _scores(self, probe: Probe) -> Scores:
        expected = probe.distributions.rows
        picture = () if probe.picture is None else (Image.fromarray(probe.picture), probe.place)
        logits = self.model.predictions(probe.tokens, len(expected), *picture)
        if self.probes.from_base:  # a converter may have left out tokens beyond the tokenizer's
            n_tokens = min(logits.shape[1], expected.shape[1])
            logits, expected = logits[:, :n_tokens], expected[:, :n_tokens]
        if logits.shape[1] != expected.shape[1]:
            self._differs(
                "vocabulary", f"it has {logits.shape[1]} tokens, the model in transformers {expected.shape[1]}"
            )
        if not np.isfinite(logits).all():
            self._differs("text model", f"llama.cpp computes what is no number behind the prompt {probe.name!r}")
        came = [*probe.tokens[1 - len(expected) :], probe.tokens[-1]]  # what comes last is not known, nor compared
        return compare(expected, logits, came)

    def _differs(self, stage: str, found: str, *, own: bool = True) -> None:
        """Raise for what is written here; only warn of what a base GGUF has brought."""
        if own:
            raise ValidationError(
                f"{self.model.name}: differs from the checkpoint in transformers, most likely in its {stage}: {found}; "
                f"{_WAY_OUT}"
            )
        self.warnings.append(f"the base GGUF differs from the checkpoint in transformers in its {stage}: {found}")


def _agreement(one: Sequence[object], other: Sequence[object]) -> int:
    """The first index at which two sequences differ."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _token(tokens: Sequence[int], index: int) -> str:
    return str(tokens[index]) if index < len(tokens) else "none"


def _rendered(template: Callable[[], ChatTemplate]) -> tuple[str, str]:
    """What a template writes of `_PARTS`; of one that cannot be used, that."""
    try:
        return template().question(_QUESTION), template().after_answer()
    except InputError:
        return "nothing: it cannot be used", ""


def _excerpt(text: str, start: int) -> str:
    """The characters around the place where texts part, as they are written in a message of one line."""
    first, last = max(0, start - 12), start + 28
    return repr(f"{'…' if first else ''}{text[first:last]}{'…' if last < len(text) else ''}")

"""What the conformance tests of one process share: checkpoints, transformers' models, statistics, GGUF files."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from mode_gguf.allocation.planner import uniform_type
from mode_gguf.architectures import text_tensors
from mode_gguf.calibration.calibrate import calibrate_and_probe
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.forward.inputs import InputBuilder, ModelInputs
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.probes import Probes
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.vocabulary import ProjectorType
from tests.calibration.conftest import calibration_samples
from tests.e2e.conftest import ended, run
from tests.families.family_case import FamilyCase
from tests.families.prompts import Reference

__all__ = ["Families", "ended", "exact", "exported", "families", "run", "samples"]

T = TypeVar("T")


class Families:
    """Everything that is made once per case; nobody may change it."""

    def __init__(self, request: pytest.FixtureRequest, factory: pytest.TempPathFactory, stack: ExitStack) -> None:
        self.request, self.factory, self.stack = request, factory, stack
        self.samples = calibration_samples()
        self._made: dict[tuple[str, str], Any] = {}

    def _once(self, what: str, name: str, make: Callable[[], T]) -> T:
        if (what, name) not in self._made:
            self._made[what, name] = make()
        made: T = self._made[what, name]
        return made

    def checkpoint(self, layout: str) -> Checkpoint:
        """The checkpoint that a fixture writes."""
        return self._once("checkpoint", layout, lambda: Checkpoint.open(self.request.getfixturevalue(layout)))

    def _layouts(self, case: FamilyCase) -> tuple[Checkpoint, Checkpoint]:
        """The case's first, and one that transformers opens."""
        first = case.layouts[0]
        return self.checkpoint(first), self.checkpoint(case.transformers_layout or first)

    def load(self, case: FamilyCase) -> Any:
        """A model of transformers of the test's own."""
        stored, opened = self._layouts(case)
        return case.load(opened.path, stored)

    def model(self, case: FamilyCase) -> Any:
        """transformers' whole model in F32."""
        return self._once("model", case.name, lambda: self.load(case))

    def state(self, case: FamilyCase) -> dict[str, np.ndarray]:
        """Its parameters."""
        return self._once(
            "state", case.name, lambda: {name: value.numpy() for name, value in self.model(case).state_dict().items()}
        )

    def reference(self, case: FamilyCase, model: Any = None) -> Reference:
        """transformers' side of a comparison, by a model of one's own or by the shared one."""
        return Reference(case, *self._layouts(case), self.model(case) if model is None else model)

    def inputs(self, layout: str) -> list[ModelInputs]:
        """The samples as the model of a layout is fed."""
        builder = self._once("builder", layout, lambda: InputBuilder.open(self.checkpoint(layout)))
        return self._once("inputs", layout, lambda: [builder.build(sample) for sample in self.samples])

    def calibration(self, case: FamilyCase) -> tuple[CalibrationStatistics, Probes]:
        """Calibration on all samples, and the probes."""
        checkpoint = self.checkpoint(case.layouts[0])
        return self._once("calibration", case.name, lambda: calibrate_and_probe(checkpoint, self.samples, device="cpu"))

    def statistics(self, case: FamilyCase) -> CalibrationStatistics:
        """Calibration on all samples."""
        return self.calibration(case)[0]

    def full_precision(self, case: FamilyCase) -> tuple[Path, Path]:
        """Text model in BF16 and projector in F16, as validation has them."""
        checkpoint = self.checkpoint(case.layouts[0])
        return self._once(
            "full precision", case.name, lambda: exported(checkpoint, self.factory.mktemp("gguf"), "BF16", "F16")
        )

    def files(self, case: FamilyCase) -> tuple[Path, Path]:
        """Text model and projector in F32."""
        checkpoint = self.checkpoint(case.layouts[0])
        return self._once("files", case.name, lambda: exported(checkpoint, self.factory.mktemp("gguf")))

    def llama(self, case: FamilyCase) -> LlamaModel:
        """Both in the embedded llama.cpp."""
        return self._once("llama", case.name, lambda: self.stack.enter_context(exact(*self.files(case))))


def exported(
    checkpoint: Checkpoint, folder: Path, text_type: str = "F32", projector_type: ProjectorType = "F32"
) -> tuple[Path, Path]:
    """A checkpoint's two files."""
    text, mmproj = folder / f"pico-{text_type}.gguf", folder / f"mmproj-pico-{projector_type}.gguf"
    types = {tensor.name: uniform_type(tensor, QUANT_TYPES[text_type]) for tensor in text_tensors(checkpoint)}
    write_text_model(text, checkpoint, TensorPacking(types))
    write_projector(mmproj, checkpoint, projector_type)
    return text, mmproj


def exact(text: Path, mmproj: Path | None = None) -> LlamaModel:
    """llama.cpp as exact as it computes."""
    return LlamaModel(text, mmproj, context=1024, threads=1, exact=True)


@pytest.fixture(scope="session")
def families(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Families]:
    with ExitStack() as stack:
        yield Families(request, tmp_path_factory, stack)


@pytest.fixture(scope="session")
def samples(families: Families) -> list[Sample]:
    """Those of the calibration tests."""
    return families.samples

"""The stage that asks llama.cpp, and what there is here to ask."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mode_gguf.allocation.plan import Plan
from mode_gguf.artifacts import write_text
from mode_gguf.errors import MissingResourceError, ValidationError
from mode_gguf.llama_cpp.c_api import library_version
from mode_gguf.llama_cpp.installed_tools import find_llama_cpp
from mode_gguf.llama_cpp.runtime.installed import HOW_TO_BUILD, find_runtime
from mode_gguf.llama_cpp.runtime.speed import bench
from mode_gguf.pipeline.stage_cache import StageCache
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization import libggml
from mode_gguf.quantization.types import Packer, types_packed_by
from mode_gguf.validation.bounds import Bounds
from mode_gguf.validation.conversion_record import ConversionRecord
from mode_gguf.validation.questions import load_held_out
from mode_gguf.validation.reference import Settings, Source
from mode_gguf.validation.report import ValidationReport
from mode_gguf.validation.validate import NO_BOUNDS, validate
from mode_gguf.workfolder import WorkFolder, failure_beside


def run_validation(
    candidate: Source,
    mmproj: Path | None,
    reference: Source | None,
    report: Path,
    *,
    plan: Plan | None = None,
    held_out: Path | None = None,
    llama_cpp: Path | None = None,
    settings: Settings | None = None,
    reference_folder: Path | None = None,
    bounds: Bounds = NO_BOUNDS,
    warnings: Sequence[str] = (),
    conversion: ConversionRecord | None = None,
    progress: Progress = silent,
) -> ValidationReport:
    """Run candidate and reference in llama.cpp, compare them, and write the report to `report`.

    `warnings` and `conversion`, how the candidate was made, become part of it. The report says which `bounds` are kept;
    `validation.bounds.require_kept` stops where one is not.
    """
    with _failure_noted(report):
        result = validate(
            candidate,
            reference,
            mmproj,
            load_held_out(held_out) if held_out else None,
            planned=plan.stored_types if plan else None,
            tools=find_llama_cpp(llama_cpp),
            settings=settings,
            reference_folder=reference_folder,
            bounds=bounds,
            progress=progress,
        )
    result = result.model_copy(update={"warnings": (*result.warnings, *warnings), "conversion": conversion})
    result.save(report)
    return result


@contextmanager
def _failure_noted(report: Path) -> Iterator[None]:
    """Leave no report of an earlier run where validation fails, but a note of what failed."""
    failure = failure_beside(report)
    StageCache(WorkFolder(report.parent, "")).forget("validate")  # if `convert` put its report there
    for before in (report, failure):
        before.unlink(missing_ok=True)
    try:
        yield
    except ValidationError as error:
        write_text(failure, f"{error}\n")
        raise


def environment(llama_cpp: Path | None = None) -> dict[str, object]:
    """What computes, packs and validates here: torch's device, who packs which types, and every llama.cpp found."""
    from mode_gguf.forward.streaming import choose_device

    tools = find_llama_cpp(llama_cpp)
    runtime = find_runtime()
    return {
        "device": str(choose_device("auto")),
        "cores": os.cpu_count(),
        **{f"packed by {packer}": ", ".join(types_packed_by(packer)) for packer in Packer},
        "libggml": libggml.status(),
        "embedded llama.cpp": library_version(),
        "type per expert": f"{runtime.version} in {runtime.bin}" if runtime else f"no runtime; {HOW_TO_BUILD}",
        "llama.cpp": tools.version or ("of unknown version" if tools.programs else "none found"),
        **{name: str(path) for name, path in tools.programs.items()},
    }


def runtime_speed(progress: Progress = silent) -> dict[str, str]:
    """What a type per expert costs in speed here, in words, by the way of computing.

    Raises:
        MissingResourceError: our own build is not there, or cannot measure.
    """
    runtime = find_runtime()
    if runtime is None:
        raise MissingResourceError(f"--bench-runtime measures llama.cpp with expert groups; {HOW_TO_BUILD}")
    speeds = bench(runtime, progress)
    base = speeds["one type"]
    facts = {}
    for way, speed in speeds.items():
        ratio = f" ({speed.prompt / base.prompt:.2f} and {speed.generation / base.generation:.2f} of one type's)"
        numbers = f"{speed.prompt:.0f} tokens of a prompt and {speed.generation:.0f} of an answer per second"
        facts["speed, " + way] = numbers + (ratio if speed is not base else "")
    return facts

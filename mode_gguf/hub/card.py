"""The model card: front matter that the hub reads, and what people need to know to run a file and to trust it."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mode_gguf.hub.names import HubModel
from mode_gguf.hub.released_files import ModelRelease
from mode_gguf.llama_cpp.runtime.pinned_release import B11434
from mode_gguf.sizes import decimal_size
from mode_gguf.validation.report import Accuracy, Divergence, ValidationReport

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

log = logging.getLogger(__name__)

TAGS = ("gguf", "imatrix", "moe")
_SOMEWHERE = "OWNER/NAME"
_PAPER = "[MODE](https://arxiv.org/abs/2606.17118)"


def model_card(release: ModelRelease, repository: str | None = None, base_model: str | None = None) -> str:
    """README.md of a release, as text.

    Args:
        repository: `owner/name` where it will be published; without it, commands have a place to fill in.
        base_model: `owner/name` of the checkpoint; None for what the release knows.
    """
    from huggingface_hub import ModelCard

    base = base_model or release.base_model
    if base is None:
        log.warning(
            "the card names no base model, since the checkpoint was a folder; give it with --base-model ORG/NAME"
        )
    parts = (
        _title(release, base),
        _files(release),
        _how_to_run(release, repository or _SOMEWHERE),
        _measured(release.report),
        _calibration(release),
        _recipe(release),
        _licence(release, base),
    )
    body = "\n\n".join(block for part in parts for block in part)
    front = _front_matter(release, repository, base).to_yaml()
    return str(ModelCard(f"---\n{front}\n---\n\n{body}\n"))


def _front_matter(release: ModelRelease, repository: str | None, base: str | None) -> "ModelCardData":
    from huggingface_hub import ModelCardData

    about = release.model["metadata"]
    link = about.get("general.license.link")
    if link and base and "://" not in link:
        link = f"{HubModel(base).url}/blob/main/{link}"
    languages = about.get("general.languages")
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        quantized_by=repository.partition("/")[0] if repository else "mode-gguf",
        license=about.get("general.license"),
        license_name=about.get("general.license.name"),
        license_link=link,
        language=languages if isinstance(languages, list) else None,
        pipeline_tag="image-text-to-text" if release.of_role("projector") else "text-generation",
        tags=list(TAGS),
        # A set from the hub is known by its owner; others have names that mean nothing there.
        datasets=[name for name in release.datasets if "/" in name] or None,
    )


def _title(release: ModelRelease, base: str | None) -> Iterator[str]:
    made_from, bpw = release.plan.made_from, release.model["bpw"]
    source = f"[{base}]({HubModel(base).url})" if base else made_from.model
    if base and made_from.revision:
        source += f" at commit `{made_from.revision}`"
    beside = " The projector (image encoder) is a file of its own." if release.of_role("projector") else ""
    yield f"# {made_from.model}, {bpw:.2f} bits per weight, GGUF"
    yield (
        f"{source}, quantized to {bpw:.3f} bits per weight ({_size(release.model['size_bytes'])}) with mode-gguf "
        f"{made_from.tool_version}{_method(release)}.{beside}"
    )
    if release.has_expert_groups:
        yield (
            "> **Stock llama.cpp refuses this file**, and so does what is built on it (LM Studio, koboldcpp, Ollama): "
            "experts of a layer have different types. See below for the llama.cpp it needs."
        )


def _method(release: ModelRelease) -> str:
    if release.plan.budget is None or not release.calibration:
        return ""
    if release.calibration.get("imatrix"):
        return ": mixed precision after an importance matrix, which does not tell text from pictures"
    if not release.calibration.get("has_vision", True):
        return f": mixed precision after {_PAPER}, from what text needs of every expert"
    return f": mixed precision after {_PAPER}, from what text and pictures need of every expert"


def _files(release: ModelRelease) -> Iterator[str]:
    yield "## Files"
    rows = [
        (
            f"`{file.path.name}`",
            file.role,
            _size(file.size_bytes),
            "" if file.bpw is None else f"{file.bpw:.3f}",
            f"`{file.sha256}`",
        )
        for file in release.files
    ]
    yield _table(("file", "what", "size", "bpw", "sha256"), rows)
    if len(release.of_role("text model")) > 1:
        yield "The text model is in shards: download all of them into one folder, and name the first one."


def _how_to_run(release: ModelRelease, repository: str) -> Iterator[str]:
    mmproj = next((file.path.name for file in release.of_role("projector")), None)
    projector = f" --mmproj {mmproj}" if mmproj else ""
    ask = '--image picture.jpg -p "What is in this picture?"'
    yield "## How to run it"
    if release.has_expert_groups:
        architecture = release.model["metadata"].get("general.architecture")
        yield (
            f"The file has a type per expert and needs llama.cpp {B11434.name} with mode-gguf's patch; any other says "
            f"`unknown model architecture: '{architecture}'`. `mode-gguf runtime build` makes that llama.cpp, once; "
            "`mode-gguf run` starts it:"
        )
        yield _code(
            "mode-gguf runtime build",
            f"hf download {repository} --local-dir .",
            f"mode-gguf run {release.first_file}{projector} -- --port 8080",
            f"mode-gguf run {release.first_file}{projector} --tool llama-mtmd-cli -- {ask}",
        )
        return
    yield f"llama.cpp, which downloads the model{' and its projector' if mmproj else ''}:"
    sees = [f"llama-mtmd-cli -hf {repository}:{release.tag} {ask}"] if mmproj else []
    yield _code(f"llama-server -hf {repository}:{release.tag}", *sees)
    yield "llama.cpp, with files that are here already:"
    yield _code(
        f"hf download {repository} --include '*.gguf' --local-dir .",
        f"llama-server -m {release.first_file}{projector}",
        *([f"llama-mtmd-cli -m {release.first_file}{projector} {ask}"] if mmproj else []),
    )
    if mmproj is None:
        yield "The model is text-only."
        return
    yield (
        f"LM Studio: search for `{repository}` and download it; keep the projector in the folder of the model, where "
        "LM Studio finds it by its name."
    )
    yield f"koboldcpp: `koboldcpp --model {release.first_file}{projector}`."
    yield (
        "Works in llama.cpp, LM Studio and koboldcpp. Ollama's support for a projector in a file of its own is not "
        "promised."
    )


def _measured(report: ValidationReport | None) -> Iterator[str]:
    yield "## Measured quality"
    if report is None:
        yield "Not measured."
        return
    measured = report.divergences
    compared = f"beside {report.reference.name} " if report.reference else ""
    yield f"In {report.runtime}, {compared}on the held-out set `{report.held_out}`:"
    if not report.reference:
        yield "The file answers; it was not compared with the full-precision model."
    if measured:
        titles = ["answers about pictures" if name == "image" else name for name in measured]
        yield _table(("", *titles), _distances(list(measured.values())))
    if total := report.accuracy.get("all"):
        before = report.reference_accuracy.get("all")
        beside = f"; {_share(before)} before quantization" if before else ""
        yield f"Right answers to questions about pictures: {_share(total)}{beside}."
    for warning in report.warnings:
        yield f"Note: {warning}."


def _distances(parts: Sequence[Divergence]) -> Iterator[tuple[str, ...]]:
    if all(part.kl_mean is not None for part in parts):
        yield (
            "KL divergence, nats per token",
            *(f"{part.kl_mean:.4f} ± {part.kl_mean_error or 0:.4f}" for part in parts),
        )
        yield "its 99th percentile", *(f"{part.kl_p99:.3f}" for part in parts)
        yield "same most likely token", *(f"{100 * (part.top1_agreement or 0):.1f} %" for part in parts)
    yield "perplexity", *(f"{part.perplexity:.4f}" for part in parts)
    if all(part.reference_perplexity is not None for part in parts):
        yield "perplexity before", *(f"{part.reference_perplexity:.4f}" for part in parts)
    yield "tokens scored", *(f"{part.positions:,}" for part in parts)


def _calibration(release: ModelRelease) -> Iterator[str]:
    yield "## Calibration data"
    if not release.calibration and not release.datasets:
        yield "None: packed without an importance matrix."
        return
    samples = release.calibration.get("samples", {})
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in samples.items())
    names = ", ".join(f"`{name}`" for name in release.datasets)
    yield f"{names}{f': {counts}' if counts else ''}."
    if imatrix := release.calibration.get("imatrix"):
        yield (
            f"These are the samples of the importance matrix `{imatrix}`, counted as if they were text: it does not "
            "tell text from images, so that types were chosen without knowing what pictures need of every expert."
        )
    if key := release.calibration.get("key_tokens"):
        yield (
            f"Vision tokens count as key or redundant by `{key['criterion']}`, {100 * key['ratio']:.0f} % of them key. "
            "Stock `llama-quantize` reads the importance matrix, too."
        )


def _recipe(release: ModelRelease) -> Iterator[str]:
    plan, packing = release.plan, release.plan.packing
    yield "## Recipe"
    types = {name: found for name, found in release.model["types"].items() if name != "I32"}
    total = sum(found["n_weights"] for found in types.values())
    rows = [
        (name, f"{found['tensors']:,}", f"{100 * found['n_weights'] / total:.2f} %", _size(found["size_bytes"]))
        for name, found in types.items()
    ]
    yield _table(("type", "tensors", "weights", "size"), rows)
    budget = f", for a budget of {plan.budget.value:g} ({plan.budget.kind})" if plan.budget else ""
    experts = release.model["experts_bpw"]
    of_experts = f", the routed experts alone {experts:.3f}" if experts is not None else ""
    method, imatrix = plan.made_from.sensitivity_method, plan.made_from.imatrix_kind
    yield "\n".join(
        [
            f"- {release.model['bpw']:.4f} bits per weight{of_experts}{budget}",
            f"- {'a type per expert' if plan.has_expert_groups else 'a type per tensor'}, preset `{plan.preset}`",
            *([f"- sensitivity `{method}`, importance matrix `{imatrix}`"] if method else []),
            f"- packing `{packing.mode}`, rounding `{plan.rounding}`",
            "- every tensor's type is in plan.json",
        ]
    )
    if release.commands:
        yield f"Made with mode-gguf {plan.made_from.tool_version} by:"
        yield _code(*release.commands)


def _licence(release: ModelRelease, base: str | None) -> Iterator[str]:
    about = release.model["metadata"]
    source = f"[{base}]({HubModel(base).url})" if base else f"the original model, {release.plan.made_from.model}"
    name = about.get("general.license.name") or about.get("general.license")
    yield "## Licence and base model"
    if name:
        yield f"The licence is that of {source}: `{name}`. Its terms of use and its limits hold for this file, too."
    else:
        yield f"The checkpoint names no licence; the terms of {source} hold for this file, too."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _code(*lines: str) -> str:
    return "\n".join(["```", *lines, "```"])


def _size(n_bytes: int) -> str:
    return decimal_size(n_bytes, 2 if n_bytes >= 1e9 else 1)


def _share(accuracy: Accuracy) -> str:
    interval = f"95 % interval {100 * accuracy.low:.1f} to {100 * accuracy.high:.1f} %"
    return f"{accuracy.right} of {accuracy.asked} = {100 * accuracy.share:.1f} % ({interval})"

"""The model card: front matter that the hub reads, and what people need to know to run a file and to trust it."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode_gguf.hub.markdown import code, code_block, table, text, web_link
from mode_gguf.hub.names import HubModel, is_repository
from mode_gguf.hub.released_files import ModelRelease
from mode_gguf.llama_cpp.runtime.pinned_release import B11434
from mode_gguf.plain_text import one_line, shell_line
from mode_gguf.sizes import decimal_size
from mode_gguf.validation.report import Accuracy, Divergence, ValidationReport

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

log = logging.getLogger(__name__)

TAGS = ("gguf", "imatrix", "moe")
_SOMEWHERE = "OWNER/NAME"
_PAPER = "[MODE](https://arxiv.org/abs/2606.17118)"
_LONGEST = 300
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")


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
    """Front matter; what the model says of itself is left out where the hub has no place for it."""
    from huggingface_hub import ModelCardData

    about = release.model["metadata"]
    licence, named = _line(about, "general.license"), _line(about, "general.license.name")
    if licence and not _LICENCE.fullmatch(licence):
        licence, named = "other", named or licence
    given = _line(about, "general.license.link")
    link = web_link(given, f"{HubModel(base).url}/blob/main" if base else None) if given else None
    if given and link is None:
        log.warning("the card leaves out the link to the licence, %s: it is no address on the web, nor a file", given)
    languages = about.get("general.languages")
    listed = languages if isinstance(languages, list) else []
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        quantized_by=repository.partition("/")[0] if repository else "mode-gguf",
        license=licence,
        license_name=named,
        license_link=link,
        language=[str(one) for one in listed if _LANGUAGE.fullmatch(str(one))] or None,
        pipeline_tag="image-text-to-text" if release.of_role("projector") else "text-generation",
        tags=list(TAGS),
        # A set from the hub is known by its owner; others have names that mean nothing there.
        datasets=[name for name in release.datasets if is_repository(name)] or None,
    )


def _line(about: Mapping[str, Any], key: str) -> str | None:
    """A value that is text, on one line."""
    value = about.get(key)
    return (one_line(value, _LONGEST) or None) if isinstance(value, str) else None


def _title(release: ModelRelease, base: str | None) -> Iterator[str]:
    made_from, bpw = release.plan.made_from, release.model["bpw"]
    source = f"[{text(base)}]({HubModel(base).url})" if base else text(made_from.model)
    if base and made_from.revision:
        source += f" at commit {code(made_from.revision)}"
    beside = " The projector (image encoder) is a file of its own." if release.of_role("projector") else ""
    yield f"# {text(made_from.model)}, {bpw:.2f} bits per weight, GGUF"
    yield (
        f"{source}, quantized to {bpw:.3f} bits per weight ({_size(release.model['size_bytes'])}) with mode-gguf "
        f"{text(made_from.tool_version)}{_method(release)}.{beside}"
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
            code(file.path.name),
            file.role,
            _size(file.size_bytes),
            "" if file.bpw is None else f"{file.bpw:.3f}",
            code(file.sha256),
        )
        for file in release.files
    ]
    yield table(("file", "what", "size", "bpw", "sha256"), rows)
    if len(release.of_role("text model")) > 1:
        yield "The text model is in shards: download all of them into one folder, and name the first one."


def _how_to_run(release: ModelRelease, repository: str) -> Iterator[str]:
    mmproj = next((file.path.name for file in release.of_role("projector")), None)
    first = Path(release.first_file)
    model = shell_line([first, "--mmproj", Path(mmproj)] if mmproj else [first])
    ask = '--image picture.jpg -p "What is in this picture?"'
    yield "## How to run it"
    if release.has_expert_groups:
        refusal = f"unknown model architecture: '{release.model['metadata'].get('general.architecture')}'"
        yield (
            f"The file has a type per expert and needs llama.cpp {B11434.name} with mode-gguf's patch; any other says "
            f"{code(refusal)}. `mode-gguf runtime build` makes that llama.cpp, once; "
            "`mode-gguf run` starts it:"
        )
        yield code_block(
            "mode-gguf runtime build",
            f"hf download {repository} --local-dir .",
            f"mode-gguf run {model} -- --port 8080",
            f"mode-gguf run {model} --tool llama-mtmd-cli -- {ask}",
        )
        return
    yield f"llama.cpp, which downloads the model{' and its projector' if mmproj else ''}:"
    sees = [f"llama-mtmd-cli -hf {repository}:{release.tag} {ask}"] if mmproj else []
    yield code_block(f"llama-server -hf {repository}:{release.tag}", *sees)
    yield "llama.cpp, with files that are here already:"
    yield code_block(
        f"hf download {repository} --include '*.gguf' --local-dir .",
        f"llama-server -m {model}",
        *([f"llama-mtmd-cli -m {model} {ask}"] if mmproj else []),
    )
    if mmproj is None:
        yield "The model is text-only."
        return
    yield (
        f"LM Studio: search for `{repository}` and download it; keep the projector in the folder of the model, where "
        "LM Studio finds it by its name."
    )
    yield f"koboldcpp: {code(f'koboldcpp --model {model}')}."
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
    compared = f"beside {text(report.reference.name)} " if report.reference else ""
    yield f"In {text(report.runtime)}, {compared}on the held-out set {code(report.held_out)}:"
    if not report.reference:
        yield "The file answers; it was not compared with the full-precision model."
    if measured:
        titles = ["answers about pictures" if name == "image" else name for name in measured]
        yield table(("", *titles), _distances(list(measured.values())))
    if total := report.accuracy.get("all"):
        before = report.reference_accuracy.get("all")
        beside = f"; {_share(before)} before quantization" if before else ""
        yield f"Right answers to questions about pictures: {_share(total)}{beside}."
    if (export := report.transformers) and export.text:
        pictures = f", and {export.image.kl_median:.1g} behind one about a picture" if export.image else ""
        yield (
            f"The unquantized export was checked first: tokens and chat template are those of transformers, and its "
            f"predictions are {export.text.kl_median:.1g} nats (median KL) away from them on text prompts{pictures}."
        )
    for warning in report.warnings:
        yield f"Note: {text(warning)}."


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
    counts = ", ".join(f"{count:,} {text(name.replace('_', ' '))}" for name, count in samples.items())
    names = ", ".join(map(code, release.datasets))
    yield f"{names}{f': {counts}' if counts else ''}."
    if imatrix := release.calibration.get("imatrix"):
        yield (
            f"These are the samples of the importance matrix {code(imatrix)}, counted as if they were text: it does "
            "not tell text from images, so that types were chosen without knowing what pictures need of every expert."
        )
    if key := release.calibration.get("key_tokens"):
        yield (
            f"Vision tokens count as key or redundant by {code(key['criterion'])}, {100 * key['ratio']:.0f} % of them "
            "key. Stock `llama-quantize` reads the importance matrix, too."
        )


def _recipe(release: ModelRelease) -> Iterator[str]:
    plan, packing = release.plan, release.plan.packing
    yield "## Recipe"
    types = {name: found for name, found in release.model["types"].items() if name != "I32"}
    total = sum(found["n_weights"] for found in types.values())
    rows = [
        (text(name), f"{found['tensors']:,}", f"{100 * found['n_weights'] / total:.2f} %", _size(found["size_bytes"]))
        for name, found in types.items()
    ]
    yield table(("type", "tensors", "weights", "size"), rows)
    budget = f", for a budget of {plan.budget.value:g} ({plan.budget.kind})" if plan.budget else ""
    experts = release.model["experts_bpw"]
    of_experts = f", the routed experts alone {experts:.3f}" if experts is not None else ""
    method, imatrix = plan.made_from.sensitivity_method, plan.made_from.imatrix_kind
    yield "\n".join(
        [
            f"- {release.model['bpw']:.4f} bits per weight{of_experts}{budget}",
            f"- {'a type per expert' if plan.has_expert_groups else 'a type per tensor'}, preset {code(plan.preset)}",
            *([f"- sensitivity {code(method)}, importance matrix {code(imatrix)}"] if method else []),
            f"- packing {code(packing.mode)}, rounding {code(plan.rounding)}",
            "- every tensor's type is in plan.json",
        ]
    )
    if release.commands:
        yield f"Made with mode-gguf {text(plan.made_from.tool_version)} by:"
        yield code_block(*release.commands)


def _licence(release: ModelRelease, base: str | None) -> Iterator[str]:
    about = release.model["metadata"]
    made_from = text(release.plan.made_from.model)
    source = f"[{text(base)}]({HubModel(base).url})" if base else f"the original model, {made_from}"
    name = _line(about, "general.license.name") or _line(about, "general.license")
    yield "## Licence and base model"
    if name:
        yield f"The licence is that of {source}: {code(name)}. Its terms of use and its limits hold for this file, too."
    else:
        yield f"The checkpoint names no licence; the terms of {source} hold for this file, too."


def _size(n_bytes: int) -> str:
    return decimal_size(n_bytes, 2 if n_bytes >= 1e9 else 1)


def _share(accuracy: Accuracy) -> str:
    interval = f"95 % interval {100 * accuracy.low:.1f} to {100 * accuracy.high:.1f} %"
    return f"{accuracy.right} of {accuracy.asked} = {100 * accuracy.share:.1f} % ({interval})"

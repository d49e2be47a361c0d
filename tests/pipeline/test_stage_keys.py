"""Every input of every stage, changed one by one: just the stages that read it have another key."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mode_gguf import pipeline
from mode_gguf.checkpoint import side_files
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.checkpoint.stored_tensor import StoredTensor
from mode_gguf.pipeline.conversion import Conversion
from mode_gguf.pipeline.run import Stage
from mode_gguf.pipeline.stage_cache import StageCache, StageState, file_identity
from mode_gguf.pipeline.stages.unit_kl import MeasureUnitKl
from mode_gguf.recipe import OptionLayer, Recipe, nested

MEASURING = {"calibrate", "sensitivity", "unit-kl"}
ROUNDED = {"round", "export", "validate"}
ALL = {*MEASURING, "plan", *ROUNDED, "projector", "mtp", "reference", "probes"}
OF_INPUTS = {*MEASURING, *ROUNDED}
"""Stages that depend on what the model is measured on; the plan knows that by what was measured."""
OF_PICTURES = {*OF_INPUTS, "projector", "probes"}
"""Stages that prepare pictures, or say how."""
OF_TEXT = {*MEASURING, *ROUNDED, "reference", "mtp", "probes"}
"""Stages that read tokenizer or chat template."""
OF_KEYS = {"export", "reference", "projector", "mtp", "validate"}
"""Stages that write general.* keys, and the one that judges what they wrote."""
NONE: set[str] = set()


@dataclass(frozen=True)
class Inputs:
    """Folders of a conversion's inputs, which a test may change."""

    model: Path
    samples: Path
    held_out: Path
    outside: Path

    @classmethod
    def below(cls, path: Path, model: str) -> "Inputs":
        return cls(path / model, path / "samples", path / "held-out", path / "outside")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, pico: Path) -> Inputs:
    """The inputs as they are at first; read only."""
    path = tmp_path_factory.mktemp("inputs")
    inputs = Inputs.below(path, pico.name)
    shutil.copytree(pico, inputs.model)
    for folder in (inputs.samples, inputs.held_out, inputs.outside):
        folder.mkdir()
    for number in range(2):
        picture(inputs.outside / f"{number}.png", 100)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    (inputs.samples / "chats.jsonl").write_text(json.dumps({"image": "../outside/0.png", "conversations": turns}))
    (inputs.samples / "text.txt").write_text("The quick brown fox jumps over the lazy dog.")
    (inputs.held_out / "text.jsonl").write_text(json.dumps({"text": "The dog is brown."}))
    (inputs.held_out / "1.png").symlink_to(inputs.outside / "1.png")
    question = {"image": "1.png", "question": "What is it?", "answer": "A square."}
    (inputs.held_out / "questions.jsonl").write_text(json.dumps(question))
    return inputs


OPENED: dict[str, set[Path]] = {}
"""Files that Python opened while a stage ran, by stage: filled by `out`."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, written: Inputs) -> Iterator[Path]:
    """The work folder of a conversion of these inputs."""
    running: list[str] = []
    recorded = StageCache.recorded

    @contextmanager
    def noted(cache: StageCache, stage: StageState) -> Iterator[None]:
        with recorded(cache, stage):
            running.append(stage.name)
            yield
            running.pop()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if running and event == "open" and isinstance(arguments[0], str | os.PathLike):
            OPENED.setdefault(running[-1], set()).add(Path(arguments[0]))

    out = tmp_path_factory.mktemp("out") / "work"
    sys.addaudithook(audit)  # for good, and without effect where no stage is running
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageCache, "recorded", noted)
        # Looks at the first bytes of every text, wherever a library is going to read the folder.
        patch.setattr(side_files, "_is_marked", lambda path: False)
        unit_kl = {"plan": {"unit_kl": True}, "sensitivity": {"measured_samples": 1}}
        pipeline.convert(pipeline.open_model(written.model, out), recipe(written, unit_kl))
    yield out
    OPENED.clear()


@pytest.fixture
def copy(tmp_path: Path, written: Inputs) -> Inputs:
    """The same inputs elsewhere, with other times."""
    inputs = Inputs.below(tmp_path, written.model.name)
    for source, target in zip(fields(Inputs), fields(Inputs), strict=True):
        shutil.copytree(
            getattr(written, source.name), getattr(inputs, target.name), copy_function=shutil.copyfile, symlinks=True
        )
    (link := inputs.held_out / "1.png").unlink()
    link.symlink_to(inputs.outside / "1.png")
    return inputs


def picture(path: Path, grey: int) -> None:
    Image.fromarray(np.full((96, 96, 3), grey, np.uint8)).save(path)


def recipe(inputs: Inputs, changes: dict[str, Any] | None = None) -> Recipe:
    values = {
        "calibration": {"source": str(inputs.samples)},
        "sensitivity": {"types": "Q2_K,Q4_K", "dense_types": "Q4_K"},
        "plan": {"budget": {"bpw": 3.6}},
        "validation": {"samples": str(inputs.held_out), "allow_outside_samples": True},
        "compute": {"threads": 1},
    }
    return Recipe.of(OptionLayer(values), *([OptionLayer(changes)] if changes else []))


def keys(inputs: Inputs, out: Path, asked: Recipe) -> dict[str, dict[str, Any]]:
    """The key of every stage, and of those that only some recipes ask for."""
    run = pipeline.open_model(inputs.model, out, asked)
    conversion = Conversion.of(run, asked)
    export = conversion.export_stage()
    plan = export.resolved_plan(run)
    stages: list[Stage] = [
        conversion.calibrate,
        conversion.sensitivity,
        MeasureUnitKl(conversion.sensitivity, conversion.settings.measured_samples),
        *conversion.writing_stages(run),
        pipeline.RoundWithFeedback(plan, conversion.calibrate),
        pipeline.ExportMtp(asked.export.mtp or "Q8_0"),
        pipeline.ExportReference(),
    ]
    return {stage.name: json.loads(json.dumps(stage.key(run), default=str)) for stage in stages}


def changed(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}


def edit(name: str, **values: Any) -> Callable[[Inputs], None]:
    """A change of a JSON file of the model; a new one if it is not there."""

    def apply(inputs: Inputs) -> None:
        path = inputs.model / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))

    return apply


def write(name: str, text: str) -> Callable[[Inputs], None]:
    def apply(inputs: Inputs) -> None:
        path = inputs.model / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    return apply


def card(front: str, prose: str) -> Callable[[Inputs], None]:
    return write("README.md", f"---\n{front}\n---\n{prose}\n")


def rows(*, times_kept: bool) -> Callable[[Inputs], None]:
    """Some rows of one expert's weights in place, at the beginning of the tensor."""

    def apply(inputs: Inputs) -> None:
        tensors = Checkpoint.open(inputs.model).tensors
        stored: StoredTensor = next(one for name, one in tensors.items() if "experts" in name)
        before = stored.file.stat()
        with stored.file.open("rb+") as file:
            file.seek(stored.offset)
            flipped = bytes(byte ^ 1 for byte in file.read(64))
            file.seek(stored.offset)
            file.write(flipped)
        if times_kept:
            os.utime(stored.file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return apply


def touched(inputs: Inputs) -> None:
    for folder in (inputs.model, inputs.samples, inputs.held_out):
        for path in folder.rglob("*"):
            os.utime(path, (1e9, 1e9))


def at(part: str, name: str, text: str) -> Callable[[Inputs], None]:
    return lambda inputs: (getattr(inputs, part) / name).write_text(text) and None


CHANGES: dict[str, tuple[Callable[[Inputs], None], set[str]]] = {
    "nothing": (lambda inputs: None, NONE),
    "times": (touched, NONE),
    "a note": (write("notes.txt", "seen"), NONE),
    "licence": (write("LICENSE", "MIT"), NONE),
    "weights": (rows(times_kept=False), ALL),
    "weights, with the time set back": (rows(times_kept=True), ALL),
    "configuration": (edit("config.json", pad_token_id=3), ALL),
    "quantization settings": (edit("config.json", quantization_config={}), ALL),
    "vocabulary": (edit("vocab.json", surprise=300), OF_TEXT),
    "merges": (write("merges.txt", "#version: 0.2\na b\n"), OF_TEXT),
    "tokenizer": (edit("tokenizer.json", truncation=None, note=1), OF_TEXT),
    "tokenizer's settings": (edit("tokenizer_config.json", add_bos_token=True), OF_TEXT),
    "added tokens": (write("added_tokens.json", '{"<new>": 301}'), OF_TEXT),
    "special tokens": (write("special_tokens_map.json", '{"eos_token": "a"}'), OF_TEXT),
    "sentencepiece": (write("tokenizer.model", "x"), OF_TEXT),
    "tiktoken": (write("tiktoken.model", "x"), OF_TEXT),
    "template in the settings": (edit("tokenizer_config.json", chat_template="{{ messages }}"), OF_TEXT),
    "template of its own": (write("chat_template.jinja", "{{ messages }}"), OF_TEXT),
    "template as JSON": (write("chat_template.json", '{"chat_template": "{{ messages }}"}'), OF_TEXT),
    "another template": (write("additional_chat_templates/tools.jinja", "{{ tools }}"), OF_TEXT),
    "image processor": (edit("preprocessor_config.json", image_mean=[0.4, 0.4, 0.4]), OF_PICTURES),
    "processor": (write("processor_config.json", "{}"), OF_PICTURES),
    "video processor": (write("video_preprocessor_config.json", "{}"), OF_PICTURES),
    "generation settings": (edit("generation_config.json", temperature=0.1), OF_KEYS),
    "model card": (card("license: mit", ""), OF_KEYS),
    "sample": (at("samples", "text.txt", "The dog is brown."), OF_INPUTS),
    "another sample": (at("samples", "more.txt", "The dog is brown."), OF_INPUTS),
    "picture of a sample": (lambda inputs: picture(inputs.outside / "0.png", 101), OF_INPUTS),
    "unused picture": (lambda inputs: picture(inputs.samples / "9.png", 101), NONE),
    "held-out text": (at("held_out", "text.jsonl", '{"text": "The fox."}'), {"validate"}),
    "held-out picture": (lambda inputs: picture(inputs.outside / "1.png", 101), {"validate"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_seen_by_its_stages(name: str, written: Inputs, copy: Inputs, out: Path) -> None:
    change, expected = CHANGES[name]
    before = keys(copy, out, recipe(copy))
    change(copy)
    now = keys(copy, out, recipe(copy))
    assert changed(before, now) == expected


def test_no_stage_opens_a_file_that_is_not_in_its_key(written: Inputs, out: Path) -> None:
    entries = json.loads((out / "stages.json").read_text())
    assert OPENED.keys() == entries.keys() - {"report", "probes"}  # drawn from the others; written by calibrate
    found = {
        stage: {str(path.relative_to(written.model)) for path in opened if path.is_relative_to(written.model)}
        for stage, opened in OPENED.items()
    }
    assert {"tokenizer_config.json", "preprocessor_config.json", "config.json"} <= found["calibrate"]
    assert {"tokenizer.json", "README.md", "generation_config.json"} <= found["export"]
    for stage, names in found.items():
        covered = json.dumps(entries[stage]["settings"]) + " config.json model.safetensors.index.json"
        # Calibration builds the vocabulary's keys to see that they can be written, and keeps nothing of them.
        checked = {"generation_config.json"} if stage == "calibrate" else set()
        missing = {name for name in names - checked if name not in covered and not name.endswith(".safetensors")}
        assert missing == set(), stage


def test_prose_of_the_model_card_is_not_read(copy: Inputs, out: Path) -> None:
    found = []
    for prose in ("One.", "Another."):
        card("license: mit", prose)(copy)
        found.append(keys(copy, out, recipe(copy)))
    assert changed(*found) == NONE


def test_a_copy_is_the_same_model_with_the_same_samples(written: Inputs, copy: Inputs, out: Path) -> None:
    """But for the path of the held-out set, which the report names."""
    assert changed(keys(written, out, recipe(written)), keys(copy, out, recipe(copy))) == {"validate"}
    run = pipeline.open_model(copy.model, out)
    assert all(stage.is_current(run) for stage in Conversion.of(run, recipe(copy)).measuring_stages())


def test_templates_and_pictures_count_for_samples_that_have_them(copy: Inputs, out: Path) -> None:
    (copy.samples / "chats.jsonl").unlink()
    before = keys(copy, out, recipe(copy))
    write("chat_template.jinja", "{{ messages }}")(copy)
    edit("preprocessor_config.json", image_mean=[0.4, 0.4, 0.4])(copy)
    others = {"export", "reference", "mtp", "projector", "probes", "validate"}
    assert changed(before, keys(copy, out, recipe(copy))) == others


def test_weights_are_read_once(copy: Inputs, tmp_path: Path) -> None:
    """By the first process; what it keeps is enough for the next, while the files are as they were."""
    kept = tmp_path / "digests"
    checkpoint = Checkpoint.open(copy.model)
    first = replace(checkpoint.identity, kept=kept).fingerprint()
    stored = json.loads(kept.read_text())
    weights = {str(path) for path in copy.model.glob("*.safetensors")}
    assert stored.keys() == weights
    kept.write_text(json.dumps({path: [stamp, "0" * 64] for path, (stamp, _) in stored.items()}))
    from mode_gguf import file_digests

    file_digests._KNOWN.clear()
    assert replace(checkpoint.identity, kept=kept).fingerprint() != first, "not read again"
    file_digests._KNOWN.clear()
    for content in ("", "{", "[]", '{"a": 1}', '{"a": [["x", 1, 2, 3], "0"]}'):
        kept.write_text(content)
        assert replace(checkpoint.identity, kept=kept).fingerprint() == first


OPTIONS: dict[str, tuple[Any, set[str]]] = {
    "checkpoint.pre_tokenizer": ("llama-bpe", {"plan", "export", "reference", "mtp", "validate"}),
    "calibration.image_samples": (7, OF_INPUTS),
    "calibration.text_samples": (7, OF_INPUTS),
    "calibration.key_tokens": ("all", OF_INPUTS),
    "calibration.key_ratio": (0.3, OF_INPUTS),
    "calibration.seed": (5, {*OF_INPUTS, "plan"}),
    "sensitivity.method": ("expert-mse", {"sensitivity", "unit-kl", "plan"}),
    "sensitivity.imatrix": ("plain", {"sensitivity", "unit-kl"}),
    "sensitivity.types": ("Q2_K,Q5_K", {"sensitivity", "unit-kl", "plan"}),
    "sensitivity.dense_types": ("Q5_K", {"sensitivity", "unit-kl", "plan"}),
    "sensitivity.packing.mode": ("exact", {"sensitivity", "unit-kl", "plan"}),
    "sensitivity.packing.effort": ("fast", {"sensitivity", "unit-kl"}),
    "sensitivity.packing.size_power": (1.0, {"sensitivity", "unit-kl"}),
    "sensitivity.packing.unbiased": (False, {"sensitivity", "unit-kl"}),
    "sensitivity.measured_samples": (3, {"unit-kl"}),
    "plan.budget.bpw": (3.7, {"plan"}),
    "plan.granularity": ("expert", {"plan"}),
    "plan.rounding": ("nearest", {"plan"}),
    "plan.floors": ({"output": "Q4_K"}, {"plan"}),
    "plan.costs.combination": ("product", {"plan"}),
    "plan.costs.answer_weights": ((1.0, 2.0), {"plan"}),
    "plan.costs.modality_weights": ((1.0, 2.0, 1.0), {"plan"}),
    "plan.costs.pooled": (True, {"plan"}),
    "plan.costs.frequency_floor": (0.5, {"plan"}),
    "plan.scope": ("layer", {"plan"}),
    "plan.dense": ("fixed", {"plan"}),
    "plan.use_all": (True, {"plan"}),
    "plan.unit_kl": (True, {"plan"}),
    "plan.refine": (1, {"plan"}),
    "export.mmproj_type": ("Q8_0", {"projector", "validate"}),
    "export.shard_size": ("1MB", {"export", "validate"}),
    "export.mtp": ("Q4_K", {"mtp"}),
    "validation.samples": (None, {"validate"}),
    "validation.answers": ("given", {"validate"}),
    "validation.context": (2048, {"validate"}),
    "validation.text_tokens": (9, {"validate"}),
    "validation.answer_tokens": (9, {"validate"}),
    "validation.top_logprobs": (9, {"validate"}),
    "validation.limits.max_kl": (9.0, {"validate"}),
    "validation.placement.n_gpu_layers": (1, {"validate"}),
    "compute.device": ("cpu", {*OF_INPUTS, "probes"}),
    "compute.threads": (2, NONE),
    "compute.hidden_memory": ("1GiB", NONE),
}

BUDGETS = {
    "size": {"bpw": None, "size": "2.5MB"},
    "fit": {"bpw": None, "fit": "1GiB", "gpu": {"context": 512, "reserve": "1MB"}},
}
OTHERWISE = {
    "checkpoint.base_gguf": "tests/e2e/test_base_gguf.py",
    "checkpoint.base_mmproj": "its content is part of the model's fingerprint, as that of base_gguf",
    "calibration.source": "CHANGES",
    "calibration.from_imatrix": "tests/e2e/test_base_gguf.py",
    "plan.budget.size": "BUDGETS",
    "plan.budget.expert_bpw": "takes the place of bpw",
    "plan.budget.fit": "BUDGETS",
    "plan.uniform": "refused by `convert`",
    "validation.validate": "whether the stage is asked for",
    "validation.allow_outside_samples": "whether a set is refused",
    "validation.llama_cpp": "tests/llama_cpp",
    "validation.library": "tests/llama_cpp",
}
"""Options that another test changes, or that are no setting of a stage."""


def names(options: Any, prefix: str = "") -> Iterator[str]:
    for one in fields(options):
        value = getattr(options, one.name)
        yield from names(value, f"{prefix}{one.name}.") if is_dataclass(value) else [prefix + one.name]


def test_no_option_is_forgotten() -> None:
    """Limits and places of layers are alike: one of each group stands for it."""
    alike = ("validation.limits.", "validation.placement.", "plan.budget.gpu.", "preset")
    missing = {name for name in names(Recipe()) if not name.startswith(alike)} - {*OPTIONS, *OTHERWISE}
    assert missing == set(), "which stages depend on these?"


@pytest.mark.parametrize("option", OPTIONS)
def test_a_changed_option_is_seen_by_its_stages(option: str, written: Inputs, out: Path) -> None:
    value, expected = OPTIONS[option]
    before = keys(written, out, recipe(written))
    now = keys(written, out, recipe(written, nested(tuple(option.split(".")), value)))
    assert changed(before, now) == expected


@pytest.mark.parametrize("kind", BUDGETS)
def test_budgets_that_pay_for_metadata_see_it(kind: str, copy: Inputs, out: Path) -> None:
    asked = recipe(copy, {"plan": {"budget": BUDGETS[kind]}})
    before = keys(copy, out, asked)
    change = card("license_name: " + "long" * 50, "") if kind == "size" else edit("preprocessor_config.json", note=1)
    change(copy)
    assert "plan" in changed(before, keys(copy, out, asked))


def test_files_of_gigabytes_are_known_by_content_too(tmp_path: Path) -> None:
    """Measurements of the largest models are, and their sizes say nothing."""
    found, path = set(), tmp_path / "calibration.safetensors"
    for last in (b"a", b"b"):
        path.write_bytes(b"")
        os.truncate(path, 2**30)
        with path.open("ab") as file:
            file.write(last)
        found.add(file_identity(path))
    assert len(found) == 2

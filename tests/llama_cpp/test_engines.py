"""Choice of the engine for a file, and two engines side by side in one process."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mode_gguf.artifacts import write_json
from mode_gguf.errors import InputError, MissingResourceError, UsageError
from mode_gguf.gguf.header import read_header
from mode_gguf.llama_cpp import c_api, engines
from mode_gguf.llama_cpp.command_line import command_line
from mode_gguf.llama_cpp.engines import Engine, engine_for, named_engine
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.llama_cpp.runtime.installed import RECORD, Runtime, cache_folder, find_runtime
from mode_gguf.llama_cpp.runtime.pinned_release import BuildVariant
from mode_gguf.llama_cpp_library import ENVIRONMENT_VARIABLE
from mode_gguf.validation import reference
from mode_gguf.validation.questions import HeldOutSet, Question, load_held_out
from mode_gguf.validation.reference import RunSettings, ScoredSample, measure_reference
from mode_gguf.validation.validate import ComparedModels, validate
from tests.llama_cpp.builds import PATCHED, named_build
from tests.llama_cpp.runtime.grouped_files import Groups, random_groups, write_dequantized, write_grouped
from tests.llama_cpp.stand_ins import BUILT, write_header, write_program
from tests.validation.conftest import Files

TOOLS = ("llama-server", "llama-mtmd-cli", "llama-bench")


@pytest.fixture
def stock_file(tmp_path: Path) -> Path:
    return write_header(tmp_path / "stock.gguf", "qwen3vlmoe")


@pytest.fixture
def grouped_file(tmp_path: Path) -> Path:
    return write_header(tmp_path / "grouped.gguf", "qwen3vlmoe+expert_groups")


@pytest.fixture
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a build of ours nor programs of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def pretend_tools(folder: Path) -> None:
    for name in TOOLS:
        write_program(folder / name)


@pytest.fixture
def runtime(no_programs: None) -> Runtime:
    """A folder that looks like a build of ours."""
    folder = cache_folder() / BuildVariant().name
    pretend_tools(folder / "bin")
    write_json(folder / RECORD, BUILT.model_dump(mode="json"))
    return Runtime(folder, BUILT)


def test_layout_of_the_release() -> None:
    """moe_cache_size, a size_t, is the only difference, and fields before it stay where they are."""
    embedded, ours = c_api.ContextParams, c_api.ContextParams11434
    assert ours.type_v.offset == embedded.type_v.offset
    assert embedded.abort_callback.offset - ours.abort_callback.offset == c_api.ContextParams.moe_cache_size.size
    assert embedded.defaults.keys() - ours.defaults.keys() == {"moe_cache_size"}


def test_which_engine(stock_file: Path, grouped_file: Path, runtime: Runtime) -> None:
    embedded = Engine(c_api.library_version())
    ours = Engine("llama.cpp b11434 with expert groups (patch 0123456789ab, cpu)", runtime.bin)
    assert engine_for(stock_file) == engine_for(stock_file, stock_file) == embedded
    assert engine_for(grouped_file) == engine_for(stock_file, grouped_file) == ours


@pytest.mark.usefixtures("no_programs")
def test_runtime_is_missing(stock_file: Path, grouped_file: Path) -> None:
    assert engine_for(stock_file).folder is None
    message = r"grouped\.gguf: has one type per expert and needs .*; build it with: mode-gguf runtime build$"
    with pytest.raises(MissingResourceError, match=message):
        engine_for(stock_file, grouped_file)
    with pytest.raises(MissingResourceError, match=message):
        LlamaModel(grouped_file)
    with pytest.raises(MissingResourceError, match=message):
        command_line(grouped_file, "llama-server")


def test_runtime_without_libraries(grouped_file: Path, runtime: Runtime) -> None:
    with pytest.raises(MissingResourceError, match=r"libmtmd\.\w+ cannot be loaded .*runtime build --rebuild"):
        LlamaModel(grouped_file)


def test_program_of_ours(stock_file: Path, grouped_file: Path, runtime: Runtime, tmp_path: Path) -> None:
    pretend_tools(tmp_path / "users")
    users = command_line(stock_file, "llama-server", None, ("-c", "512"), tmp_path / "users")
    assert Path(users[0]).samefile(tmp_path / "users" / "llama-server")
    assert users[1:] == ["-m", str(stock_file), "-c", "512"]
    ours = str(runtime.bin / "llama-server")
    assert command_line(stock_file, "llama-server") == [ours, "-m", str(stock_file)]
    line = command_line(grouped_file, "llama-server", stock_file, ("--port", "1"), tmp_path / "users")
    assert line == [ours, "-m", str(grouped_file), "--mmproj", str(stock_file), "--port", "1"]
    with pytest.raises(UsageError, match="--mmproj: llama-bench takes no projector"):
        command_line(grouped_file, "llama-bench", stock_file)
    with pytest.raises(InputError, match=r"absent\.gguf: cannot be read"):
        command_line(tmp_path / "absent.gguf", "llama-bench")
    with pytest.raises(MissingResourceError, match=r"llama-perplexity is missing; .* --rebuild"):
        command_line(grouped_file, "llama-perplexity")


@pytest.mark.usefixtures("no_programs")
def test_no_program(stock_file: Path) -> None:
    with pytest.raises(
        MissingResourceError, match=r"llama-bench was not found: .*--llama-cpp.*mode-gguf runtime build"
    ):
        command_line(stock_file, "llama-bench")


def test_reference_is_measured_again_by_another_engine(
    full: Files, settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = HeldOutSet("one", ("The quick brown fox",), ())
    measured: list[str | Question] = []
    original = reference._measure

    def counted(model: LlamaModel, sample: str | Question, settings: RunSettings) -> ScoredSample:
        measured.append(sample)
        return original(model, sample, settings)

    monkeypatch.setattr(reference, "_measure", counted)
    for version in ("a", "a", "b"):
        measure_reference(full.text, None, held_out, tmp_path, replace(settings, engine=Engine(version)))
    assert len(measured) == 2


@pytest.fixture(scope="module")
def patched() -> Iterator[Runtime]:
    """The real build with our patch, found as if it were in the cache."""
    folder = named_build(PATCHED)
    with pytest.MonkeyPatch.context() as patch:
        runtime = Runtime(folder.parent, BUILT)
        assert runtime.bin.samefile(folder)
        patch.setattr(engines, "find_runtime", lambda: runtime)
        yield runtime


@pytest.fixture(scope="module")
def group_of(full: Files) -> Groups:
    """Every expert of every layer in one of two groups, by chance."""
    header = read_header(full.text)
    experts = {int(name.split(".")[1]): info.shape[0] for name, info in header.tensors.items() if "ffn_up_exps" in name}
    return random_groups(list(experts), next(iter(experts.values())), 2, seed=3)


@pytest.mark.runtime
def test_same_logits_in_both_engines(
    patched: Runtime, group_of: Groups, full: Files, settings: RunSettings, picture: Image.Image, tmp_path: Path
) -> None:
    """One process, both libraries at once, the same weights in groups and not: text, and an answer about a picture."""
    exact = replace(settings, exact=True)
    grouped = write_grouped(tmp_path / "grouped.gguf", [full.text, full.text], group_of)
    with exact.load(grouped, full.mmproj) as ours, exact.load(full.text, full.mmproj) as embedded:
        assert ours._lib is not embedded._lib
        tokens = ours.tokenize("The quick brown fox jumps over the lazy dog.")
        assert tokens == embedded.tokenize("The quick brown fox jumps over the lazy dog.")
        prompt = ours.chat_template.question("What is this?", ours.image_marker)
        assert prompt == embedded.chat_template.question("What is this?", embedded.image_marker)
        for rows, expected in (
            (ours.text_logits(tokens), embedded.text_logits(tokens)),
            (ours.logits(prompt, tokens, picture), embedded.logits(prompt, tokens, picture)),
        ):
            np.testing.assert_allclose(rows, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.runtime
def test_validate_in_our_build(
    patched: Runtime,
    group_of: Groups,
    full: Files,
    small: Files,
    held_out_folder: Path,
    settings: RunSettings,
    tmp_path: Path,
) -> None:
    """Experts in Q2_K and F32 side by side, and the ordinary file of the same weights in the embedded llama.cpp."""
    sources = [small.text, full.text]
    grouped = write_grouped(tmp_path / "grouped.gguf", sources, group_of)
    ordinary = write_dequantized(tmp_path / "ordinary.gguf", sources, group_of)
    held_out = load_held_out(held_out_folder)
    report = validate(
        ComparedModels(grouped, full.text, full.mmproj),
        held_out,
        settings=settings,
        reference_folder=tmp_path / "reference",
    )
    assert report.runtime == patched.version
    assert report.smoke is not None
    assert str(patched.bin) in report.smoke.runtime
    expected = validate(ComparedModels(ordinary, full.text, full.mmproj), held_out, settings=settings)
    for ours, embedded in ((report.text, expected.text), (report.image, expected.image)):
        assert ours is not None
        assert embedded is not None
        assert ours.kl_mean == pytest.approx(embedded.kl_mean, rel=0.2)


@pytest.mark.runtime
def test_moved_build(patched: Runtime, full: Files, tmp_path: Path) -> None:
    """Libraries find each other wherever the folder is."""
    shutil.copytree(patched.bin, tmp_path / "moved", symlinks=True)
    with LlamaModel(full.text, threads=1, engine=Engine("moved", tmp_path / "moved")) as model:
        assert np.isfinite(model.text_logits([1, 2, 3])).all()


def embedded_folder(folder: Path) -> Path:
    """A folder that looks like a build with shared libraries, of which the embedded one stands in for libmtmd."""
    embedded = c_api.library_path()
    folder.mkdir(parents=True)
    (folder / f"libmtmd{c_api._SUFFIX}").symlink_to(embedded)
    return folder


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("place", [".", "bin", "build/bin", "lib"])
def test_library_that_the_user_names(full: Files, tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = embedded_folder(tmp_path / "llama.cpp" / place)
    engine = named_engine(tmp_path / "llama.cpp")
    assert engine.folder == folder.resolve()
    assert "no program says which build it is" in caplog.text
    with LlamaModel(full.text, threads=1, engine=engine) as named, LlamaModel(full.text, threads=1) as embedded:
        assert named._lib is not embedded._lib
        np.testing.assert_array_equal(named.text_logits([1, 2, 3]), embedded.text_logits([1, 2, 3]))


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("says", ["version: 0.7.0 (build {}, commit abc)", "version: {} (abc)"])
def test_build_of_a_named_library(tmp_path: Path, says: str) -> None:
    folder = embedded_folder(tmp_path / "bin")
    for build, accepted in ((c_api.OLDEST_BUILD, True), (11433, False)):
        write_program(folder / "llama-server", f'echo "{says.format(build)}"')
        if accepted:
            assert named_engine(tmp_path).version == f"llama.cpp b{build} in {folder}"
            continue
        with pytest.raises(MissingResourceError, match=r"build 11433 found, 11434 or newer expected; .*--library"):
            named_engine(tmp_path)


def test_named_folders_without_a_library(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no libmtmd; .*BUILD_SHARED_LIBS"):
        named_engine(tmp_path)
    (tmp_path / f"libmtmd{c_api._SUFFIX}").write_text("no library")
    with pytest.raises(MissingResourceError, match=r"cannot be loaded .*--library"):
        named_engine(tmp_path).library()


@pytest.mark.usefixtures("no_programs")
def test_other_layout_of_a_named_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded_folder(tmp_path / "bin")
    monkeypatch.setitem(c_api.ContextParams.defaults, "n_seq_max", 7)
    monkeypatch.setitem(c_api.ContextParams11434.defaults, "n_seq_max", 7)
    with pytest.raises(MissingResourceError, match=r"lays out llama_context_params differently \(at n_seq_max\)"):
        named_engine(folder).library()


def test_stock_build_is_read_as_it_is_laid_out(full: Files) -> None:
    """The pinned release, whose structures differ from the embedded build's, side by side with it."""
    built = find_runtime(stock=True)
    if built is None:
        pytest.skip("mode-gguf runtime build --stock was not run")
    engine = named_engine(built.folder)
    assert engine.version.startswith("llama.cpp b11434 in ")
    options = {"threads": 1, "exact": True}
    with LlamaModel(full.text, engine=engine, **options) as stock, LlamaModel(full.text, **options) as embedded:  # type: ignore[arg-type]
        expected = embedded.text_logits([1, 2, 3])
        np.testing.assert_allclose(stock.text_logits([1, 2, 3]), expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.usefixtures("no_programs")
def test_a_type_per_expert_runs_in_no_other_build(grouped_file: Path, runtime: Runtime, tmp_path: Path) -> None:
    settings = RunSettings(engine=named_engine(embedded_folder(tmp_path / "bin")))
    with pytest.raises(UsageError, match=r"grouped\.gguf: has one type per expert .*leave --library out"):
        validate(ComparedModels(grouped_file), HeldOutSet("one", ("The quick brown fox",), ()), settings=settings)

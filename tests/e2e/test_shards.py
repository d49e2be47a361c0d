"""`--shard-size` as users give it, to commands that write a text model."""

import json
from pathlib import Path

import pytest

from mode_gguf.sizes import EXPECTED
from tests.e2e.conftest import QUICK, Run, samples, settings


@pytest.mark.parametrize("size", ["0", "abc", "-1GB", "nan", "45 PB", ""])
def test_what_is_no_size_is_refused_before_anything_is_done(pico: Path, tmp_path: Path, run: Run, size: str) -> None:
    out = tmp_path / "out"
    for command in ("convert", "export"):
        line = run(command, pico, "--out", out, "--shard-size", size, code=2)
        assert f"--shard-size: {EXPECTED}; found {size!r}" in line
    assert not out.exists()


def test_export_writes_shards_that_inspect_reads(pico: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    run("plan", pico, "--uniform", "Q4_K", *settings("sensitivity.packing.mode=exact"), "--out", out)
    result = json.loads(run("export", pico, "--out", out, "--shard-size", "1MB", "--json"))
    first = Path(result["model"])
    files = sorted(out.glob(f"{pico.name}-Q4_K-*.gguf"))
    assert first == files[0]
    assert first.name == f"{pico.name}-Q4_K-00001-of-{len(files):05d}.gguf"
    assert len(files) > 1
    assert result["size_bytes"] == sum(file.stat().st_size for file in files)
    assert json.loads(run("inspect", first, "--json"))["files"] == [str(file) for file in files]


def test_convert_validates_shards_and_reuses_them(pico: Path, tmp_path: Path, run: Run) -> None:
    """The report is about all files; a lost shard is written again; another size writes others in their place."""
    out = tmp_path / "out"

    def convert(size: str, *options: str) -> dict[str, object]:
        arguments = ("--out", out, "--bpw", "4.5", "--shard-size", size, "--json", *QUICK, *options)
        return dict(json.loads(run("convert", pico, *arguments)))

    result = convert("1MB")
    model = Path(str(result["model"]))
    files = sorted(out.glob("*-of-*.gguf"))
    assert model == files[0]
    assert len(files) > 2
    assert result["size_bytes"] == sum(file.stat().st_size for file in files)
    report = json.loads((out / "report.json").read_text())
    assert report["candidate"]["size_bytes"] == result["size_bytes"]
    assert report["candidate"]["name"] == model.name
    assert report["text"]["kl_mean"] > 0

    again = convert("1MB")
    assert set(dict(again["seconds"]).values()) == {0.0}  # type: ignore[call-overload]

    content = files[1].read_bytes()
    files[1].unlink()
    seconds = dict(convert("1MB", "--no-validate")["seconds"])  # type: ignore[call-overload]
    assert seconds["export"] > 0
    assert seconds["plan"] == 0
    assert files[1].read_bytes() == content

    fewer = convert("2MB", "--no-validate")
    assert len(sorted(out.glob("*-of-*.gguf"))) < len(files)
    assert Path(str(fewer["model"])).exists()
    assert not model.exists()


def test_merge_writes_shards(pico: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    arguments = (pico, "--out", out, *samples(2, 2), *settings("calibration.seed=1"))
    run("calibrate", *arguments)
    exact = settings("sensitivity.packing.mode=exact")
    run("sensitivity", pico, "--out", out, *exact)
    run("plan", pico, "--out", out, "--bpw", "4.5", "--granularity", "expert")
    result = json.loads(
        run("convert", *arguments, *exact, "--bpw", "4.5", "--shard-size", "1MB", "--no-validate", "--json")
    )
    files = sorted(out.glob("*-of-*.gguf"))
    assert Path(result["model"]) == files[0]
    assert len(files) > 1
    assert result["size_bytes"] == sum(file.stat().st_size for file in files)

"""Round trip from and to the hub: `convert ORG/NAME`, `card`, `publish`, with a fake hub."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants, snapshot_download
from PIL import Image

from mode_gguf.allocation.plan import Plan
from mode_gguf.hub.names import is_model_file, quant_tag
from mode_gguf.pipeline.stage_cache import file_identity
from mode_gguf.workfolder import WorkFolder
from tests.e2e.conftest import QUICK, Run, settings
from tests.hub_server import READER, WRITER, Hub
from tests.llama_cpp.stand_ins import write_program

SOURCE = "Maker/Pico-VL-MoE"
TARGET = "someone/Pico-VL-MoE-MODE-GGUF"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private") / "pictures"
    folder.mkdir()
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(folder / "0.png")
    (folder / "text.jsonl").write_text(json.dumps({"text": "The quick brown fox jumps over the lazy dog."}) + "\n")
    question = {"image": "0.png", "question": "Which colour?", "answer": "red"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    return folder


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> WorkFolder:
    return WorkFolder(Path(shutil.copytree(out, tmp_path / "copy")), "Pico-VL-MoE")


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


def front_matter(card: str) -> dict[str, object]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return dict(yaml.safe_load(match[1]))


def as_left_by(stage: str, folder: WorkFolder, path: Path) -> None:
    """Note a file as it is as an output of a stage, as if that had written it."""
    stages = json.loads(folder.stages.read_text())
    stages[stage]["outputs"][path.name] = file_identity(path)
    folder.stages.write_text(json.dumps(stages))


def ggufs(folder: Path) -> list[Path]:
    """The GGUF files for users that `convert` wrote."""
    return sorted(path for path in folder.glob("*.gguf") if "-BF16" not in path.name)


def expected_names(folder: Path) -> set[str]:
    imatrix = {path.name for path in folder.glob("imatrix-*.gguf")}
    models = {path.name for path in ggufs(folder)} - imatrix
    return {*models, f"imatrix-{folder_name(folder)}.gguf", "README.md", "plan.json", "report.json", "report.html"}


def folder_name(folder: Path) -> str:
    return Plan.load(folder / "plan.json").made_from.model


def test_a_dry_run_downloads_no_weights(hub: Hub, pico: Path, tmp_path: Path, run: Run) -> None:
    revision = hub.add(SOURCE, pico).commits[-1][0]
    out = tmp_path / "out"
    facts = json.loads(run("convert", SOURCE, "--bpw", "4.0", "--out", out, "--dry-run", "--json"))
    size = sum(path.stat().st_size for path in pico.iterdir())
    assert facts["model"] == "Pico-VL-MoE"
    download = facts["download"]
    assert (download["repository"], download["revision"]) == (SOURCE, revision)
    assert (download["size_bytes"], download["missing_bytes"]) == (size, size)
    assert " MB in 11 files" in run("convert", SOURCE, "--bpw", "4.0", "--dry-run")
    local = json.loads(run("convert", pico, "--bpw", "4.0", "--dry-run", "--json"))
    assert local["download"] is None
    assert local["reachable_bpw"] == facts["reachable_bpw"]
    assert not out.exists()
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_convert_from_the_hub(hub: Hub, pico: Path, out: Path, held_out: Path, run: Run) -> None:
    revision = hub.add(SOURCE, pico).commits[-1][0]
    arguments = ("--bpw", "4.5", "--out", out, "--samples", held_out, "--shard-size", "1MB", "--json", *QUICK)
    result = json.loads(run("convert", SOURCE, *arguments))
    assert Path(result["model"]).name.startswith("Pico-VL-MoE-MODE-4.50bpw-")
    made_from = Plan.load(out / "plan.json").made_from
    assert (made_from.repository, made_from.revision) == (SOURCE, revision)
    again = json.loads(run("convert", f"{SOURCE}@{revision}", *arguments))
    assert set(again["seconds"].values()) == {0.0}
    log = (out / "mode-gguf.log").read_text()
    assert f"convert {SOURCE} " in log


def test_what_is_not_on_the_hub(hub: Hub, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (("convert", "--bpw", "4"), ("convert", "--bpw", "4", "--dry-run"), ("calibrate",), ("plan",)):
        line = run(command[0], "Maker/Other", *command[1:], "--out", tmp_path / "out", code=4)
        assert "Maker/Other (no folder here, so looked for on the hub): no such repository" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = run("convert", "Maker/Other", "--bpw", "4", "--out", tmp_path / "out", code=4)
    assert "the hub cannot be reached" in line
    assert not (tmp_path / "out").exists()


def test_card(copy: WorkFolder, run: Run) -> None:
    copy.readme.unlink(missing_ok=True)
    shown = run("publish", TARGET, copy.path, "--card-only")
    assert str(copy.readme) in shown
    text = copy.readme.read_text()
    card = ModelCard.load(copy.readme)
    made_from = Plan.load(copy.plan).made_from
    assert front_matter(text) == {
        "base_model": SOURCE,
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text",
        "quantized_by": "someone",
        "tags": ["gguf", "imatrix", "moe"],
    }
    assert card.data.base_model == SOURCE
    report = json.loads(copy.report.read_text())
    for path in ggufs(copy.path):
        if path.name.startswith("imatrix-fisher"):
            continue
        row = next(line for line in text.splitlines() if line.startswith(f"| `{path.name}`"))
        assert hashlib.sha256(path.read_bytes()).hexdigest() in row
    first = report["candidate"]["name"]
    tag = quant_tag(first)
    assert f"llama-server -hf {TARGET}:{tag}\n" in text
    assert f"llama-server -m {first} --mmproj mmproj-Pico-VL-MoE-F16.gguf\n" in text
    assert f"llama-mtmd-cli -hf {TARGET}:{tag} --image" in text
    for words in ("LM Studio", "koboldcpp --model", "Ollama's support for a projector in a file of its own is not"):
        assert words in text
    assert f"{report['text']['kl_mean']:.4f} ± {report['text']['kl_mean_error']:.4f}" in text
    assert f"{report['image']['kl_mean']:.4f}" in text
    assert "0 of 1 = 0.0 %" in text
    assert "`pictures`" in text
    assert "image" in text.partition("## Calibration data")[2].partition("##")[0]
    assert f"at commit `{made_from.revision}`" in text
    assert f"mode-gguf convert {SOURCE} --bpw 4.5 --out work --samples pictures " in text
    assert_no_local_paths(text, copy.path)


def assert_no_local_paths(text: str, folder: Path) -> None:
    for place in (str(folder), str(folder.parent), "/tmp/", str(Path.home()) + "/", "pytest-of"):
        assert place not in text


def test_an_edited_card_is_kept(copy: WorkFolder, run: Run, logged_in: Hub) -> None:
    run("publish", TARGET, copy.path, "--card-only")
    assert TARGET in copy.readme.read_text()
    run("publish", TARGET, copy.path, "--card-only", "--base-model", "Else/Where")
    assert front_matter(copy.readme.read_text())["base_model"] == "Else/Where"
    mine = copy.readme.read_text() + "\nMy words.\n"
    copy.readme.write_text(mine)
    assert "was edited" in run("publish", TARGET, copy.path, "--card-only", code=2)
    run("publish", TARGET, copy.path, "--yes")
    assert logged_in.repositories[TARGET].files["README.md"] == mine.encode()
    copy.readme.write_text(re.sub(r"`[0-9a-f]{64}`", "`0`", mine))
    line = run("publish", TARGET, copy.path, "--yes", code=4)
    assert "its table of files does not have" in line
    run("publish", TARGET, copy.path, "--card-only", "--replace-card")
    assert "My words" not in copy.readme.read_text()
    assert "no name of a repository" in run("publish", "a/b/c", copy.path, "--card-only", code=2)


def test_without_yes_nothing_is_sent(hub: Hub, copy: WorkFolder, run: Run) -> None:
    before = set(copy.path.rglob("*"))
    facts = json.loads(run("publish", TARGET, copy.path, "--json"))
    assert {file["name"] for file in facts["files"]} == expected_names(copy.path)
    assert facts["url"] is None
    assert TARGET in facts["card"]
    shown = run("publish", TARGET, copy.path)
    assert "base_model: " + SOURCE in shown
    for file in facts["files"]:
        assert re.search(rf"^ *{file['size_bytes']:,}  {re.escape(file['name'])}$", shown, re.MULTILINE)
    assert hub.requests == []
    assert set(copy.path.rglob("*")) == before


def test_published_files_come_back_byte_for_byte(logged_in: Hub, copy: WorkFolder, run: Run, tmp_path: Path) -> None:
    facts = json.loads(run("publish", TARGET, copy.path, "--yes", "--json"))
    repository = logged_in.repositories[TARGET]
    assert facts["private"] is True
    assert repository.private
    assert facts["commit"] == repository.commits[-1][0]
    assert len(repository.commits) == 1
    back = Path(snapshot_download(TARGET, local_dir=tmp_path / "back", token=READER))
    got = {path.name: path.read_bytes() for path in back.iterdir() if path.is_file()}
    assert set(got) == expected_names(copy.path)
    for name, content in got.items():
        if name.endswith(".gguf"):
            assert content == (copy.path / name).read_bytes()
        else:
            assert_no_local_paths(content.decode(), copy.path)
    assert got["README.md"] == copy.readme.read_bytes()
    assert json.loads(got["plan.json"]) == json.loads(copy.plan.read_text())
    shards = [name for name in got if "_MODE-0000" in name]
    assert len(shards) > 1
    assert [is_model_file(name) for name in sorted(shards)] == [True] + [False] * (len(shards) - 1)
    assert len({quant_tag(name) for name in shards}) == 1

    logged_in.requests.clear()
    again = json.loads(run("publish", TARGET, copy.path, "--yes", "--json"))
    assert again["commit"] == facts["commit"]
    assert logged_in.asked("PUT", "") == []
    assert logged_in.asked("POST", "/commit/") == []


def test_an_upload_that_breaks_off_is_resumed(logged_in: Hub, copy: WorkFolder, run: Run) -> None:
    files = [path for path in ggufs(copy.path) if "imatrix-fisher" not in path.name]
    assert len(files) >= 4
    logged_in.uploads_left = 2
    line = run("publish", TARGET, copy.path, "--yes", code=4)
    assert f"{TARGET}: the hub cannot be reached, or broke off" in line
    assert "run the command again" in line
    assert logged_in.repositories[TARGET].commits == []
    sent = set(logged_in.lfs)
    assert len(sent) == 2
    logged_in.uploads_left = None
    logged_in.requests.clear()
    run("publish", TARGET, copy.path, "--yes")
    put = {path.rpartition("/")[2] for path in logged_in.asked("PUT", "/lfs/")}
    assert put == {hashlib.sha256(path.read_bytes()).hexdigest() for path in files} - sent
    assert set(logged_in.repositories[TARGET].files) == expected_names(copy.path)


def test_who_may_not_publish(hub: Hub, copy: WorkFolder, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = ("publish", TARGET, copy.path, "--yes")
    assert "nobody is logged in" in run(*publish, code=4)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    line = run(*publish, code=4)
    assert "does not accept the login; log in with `hf auth login`" in line
    assert "wrongwrong" not in line
    monkeypatch.setenv("HF_TOKEN", READER)
    line = run(*publish, code=4)
    assert "the hub refuses (403)" in line
    assert READER not in line
    assert hub.repositories == {}
    monkeypatch.setenv("HF_TOKEN", WRITER)
    for status, words in {401: "login", 403: "refuses", 404: "no such thing", 503: "fails (503"}.items():
        hub.refuse = status
        line = run(*publish, code=4)
        assert words in line
        assert WRITER not in line
    assert WRITER not in copy.log.read_text()


def test_private_and_public(logged_in: Hub, copy: WorkFolder, run: Run) -> None:
    run("publish", TARGET, copy.path, "--yes", "--public")
    assert not logged_in.repositories[TARGET].private
    line = run("publish", TARGET, copy.path, "--yes", "--private", code=2)
    assert "is public already, --private was given" in line
    assert json.loads(run("publish", TARGET, copy.path, "--yes", "--json"))["private"] is False


def test_another_model_with_the_same_tag_is_remarked_on(
    logged_in: Hub, copy: WorkFolder, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run("publish", TARGET, copy.path, "--yes")
    first = next(path for path in ggufs(copy.path) if is_model_file(path.name))
    other = f"Pico-VL-MoE-MODE-4.00bpw-{quant_tag(first.name)}.gguf"
    logged_in.repositories[TARGET].commit({other: b"another"})
    run("publish", TARGET, copy.path, "--yes")
    assert f"{other} is there already; it has the same tag" in caplog.text


def test_changed_files_are_refused(logged_in: Hub, copy: WorkFolder, run: Run) -> None:
    publish = ("publish", TARGET, copy.path, "--yes")
    files = {
        next(path for path in ggufs(copy.path) if is_model_file(path.name)): "is not what `export` wrote",
        next(copy.path.glob("mmproj-*")): "is not what `export` wrote",
        copy.imatrix: "is not the one that the model was packed with",
    }
    for path, words in files.items():
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert words in run(*publish, code=4)
        path.unlink()
        assert "is gone" in run(*publish, code=4)
        path.write_bytes(content)
    plan = json.loads(copy.plan.read_text())
    copy.plan.write_text(json.dumps({**plan, "preset": "pmq"}))
    assert "was changed after `export` had followed it" in run(*publish, code=4)
    assert logged_in.repositories == {}
    line = run("publish", TARGET, copy.path.parent, "--yes", code=4)
    assert "no work folder" in line


def test_what_was_not_validated_is_refused(logged_in: Hub, copy: WorkFolder, run: Run) -> None:
    publish = ("publish", TARGET, copy.path, "--yes")
    report, stages = json.loads(copy.report.read_text()), json.loads(copy.stages.read_text())
    report["text"]["kl_mean"] = 0.0
    copy.report.write_text(json.dumps(report))
    assert "is not what `validate` wrote" in run(*publish, code=5)
    copy.stages.write_text(json.dumps({name: entry for name, entry in stages.items() if name != "validate"}))
    assert "is not what `validate` wrote" in run(*publish, code=5)
    stages["validate"]["finished"] = "2026-01-01T00:00:00+00:00"
    copy.stages.write_text(json.dumps(stages))
    as_left_by("validate", copy, copy.report)
    assert "is older than" in run(*publish, code=5)
    stages["validate"]["finished"] = "2999-01-01T00:00:00+00:00"
    copy.stages.write_text(json.dumps(stages))
    report["candidate"]["size_bytes"] += 1
    copy.report.write_text(json.dumps(report))
    as_left_by("validate", copy, copy.report)
    assert "speaks of another file" in run(*publish, code=5)
    copy.report.unlink()
    line = run(*publish, code=5)
    assert "was never validated" in line
    assert "--unvalidated" in line
    assert logged_in.repositories == {}
    run(*publish, "--unvalidated")
    files = logged_in.repositories[TARGET].files
    assert set(files) == expected_names(copy.path) - {"report.json", "report.html"}
    assert b"Not measured." in files["README.md"]


def test_what_failed_validation_is_refused(logged_in: Hub, copy: WorkFolder, held_out: Path, run: Run) -> None:
    model = next(path for path in ggufs(copy.path) if is_model_file(path.name))
    tools = copy.path / "tools"
    write_program(tools / "llama-mtmd-cli", "exit 3")
    mmproj = next(copy.path.glob("mmproj-*"))
    validate = ("validate", model, "--mmproj", mmproj, "--samples", held_out, "--report", copy.report)
    assert "exit code 3" in run(*validate, "--llama-cpp", tools, code=5)
    assert not copy.report.exists()
    for option in ((), ("--unvalidated",)):
        line = run("publish", TARGET, copy.path, "--yes", *option, code=5)
        assert "validation failed" in line
        assert "exit code 3" in line
    assert "validation failed" in run("publish", TARGET, copy.path, "--card-only", code=5)
    assert logged_in.repositories == {}
    run(*validate)
    assert json.loads(copy.report.read_text())["reference"] is None
    run("publish", TARGET, copy.path, "--yes")
    assert b"was not compared" in logged_in.repositories[TARGET].files["README.md"]


def test_the_paths_of_the_smoke_test_stay_here(logged_in: Hub, copy: WorkFolder, run: Run) -> None:
    report = json.loads(copy.report.read_text())
    report["smoke"]["runtime"] = f"{copy.path.parent}/llama.cpp/bin/llama-mtmd-cli (1234)"
    copy.report.write_text(json.dumps(report))
    as_left_by("validate", copy, copy.report)
    run("report", copy.path)
    picture = "<img src='data:image/jpeg;base64,/9j/4'>"
    copy.page.write_text(f"<p>{report['smoke']['runtime']}</p>{picture}")
    as_left_by("report", copy, copy.page)
    run("publish", TARGET, copy.path, "--yes")
    files = logged_in.repositories[TARGET].files
    assert json.loads(files["report.json"])["smoke"]["runtime"].endswith("llama-mtmd-cli (1234)")
    for name in ("report.json", "report.html"):
        assert_no_local_paths(files[name].decode(), copy.path)
    assert picture.encode() in files["report.html"]


def published(folder: WorkFolder) -> list[Path]:
    """Everything that `publish` uploads."""
    return [folder.path / name for name in sorted(expected_names(folder.path))]


def test_what_a_link_leads_to_is_not_sent(logged_in: Hub, copy: WorkFolder, tmp_path: Path, run: Run) -> None:
    """Neither of another file nor of the very same, which may be another one a moment later."""
    run("publish", TARGET, copy.path, "--card-only")
    secret = tmp_path / "secret"
    secret.write_text("SECRET=1\n")
    paths = published(copy)
    assert len(paths) >= 8
    for path in paths:
        there = path.rename(tmp_path / "aside")
        for target in (secret, there, tmp_path / "not-there"):
            path.symlink_to(target)
            line = run("publish", TARGET, copy.path, "--unvalidated", code=4)
            assert f"{path}: is a link, and what it leads to is not published" in line
            path.unlink()
        there.rename(path)
    assert logged_in.requests == []
    run("publish", TARGET, copy.path)


def test_what_is_no_file_or_another_one_is_not_sent(logged_in: Hub, copy: WorkFolder, tmp_path: Path, run: Run) -> None:
    run("publish", TARGET, copy.path, "--card-only")
    secret = tmp_path / "secret"
    secret.write_text("SECRET=1\n")
    for path in published(copy):
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert "is no regular file" in run("publish", TARGET, copy.path, "--unvalidated", code=4)
        path.unlink()
        path.mkdir()
        assert "is no regular file" in run("publish", TARGET, copy.path, "--unvalidated", code=4)
        path.rmdir()
        path.hardlink_to(secret)
        said = run("publish", TARGET, copy.path, code=4)
        assert str(path) in said
        path.unlink()
        path.write_bytes(content)
    run("publish", TARGET, copy.path)
    assert logged_in.requests == []


def test_a_page_of_something_else(logged_in: Hub, copy: WorkFolder, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    copy.page.write_text(copy.page.read_text() + "<p>more</p>")
    line = run("publish", TARGET, copy.path, code=4)
    assert f"{copy.page}: is not what was drawn here; draw it with `mode-gguf report {copy.path}`, or move it" in line
    run("report", copy.path)
    assert "report.html" in run("publish", TARGET, copy.path)
    report = json.loads(copy.report.read_text())
    copy.report.write_text(json.dumps(report))
    as_left_by("validate", copy, copy.report)
    assert "report.html" not in {
        file["name"] for file in json.loads(run("publish", TARGET, copy.path, "--json"))["files"]
    }
    assert "is of another report.json, and left out" in caplog.text


def test_what_lies_elsewhere_is_not_sent(logged_in: Hub, copy: WorkFolder, tmp_path: Path, run: Run) -> None:
    """stages.json may name any path."""
    secret = tmp_path / "secret"
    secret.write_text("SECRET=1\n")
    stages = json.loads(copy.stages.read_text())
    for name in ("../secret", str(secret)):
        changed = json.loads(json.dumps(stages))
        changed["export"]["outputs"][name] = file_identity(secret)
        copy.stages.write_text(json.dumps(changed))
        assert "secret' is no name of a file in this folder" in run("publish", TARGET, copy.path, code=4)
    assert logged_in.requests == []


def test_a_linked_work_folder_is_one(logged_in: Hub, copy: WorkFolder, tmp_path: Path, run: Run) -> None:
    (tmp_path / "~link").symlink_to(copy.path)
    run("publish", TARGET, tmp_path / "~link", "--yes")
    assert set(logged_in.repositories[TARGET].files) == expected_names(copy.path)


def test_a_type_per_expert_says_what_it_needs(pico: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    run("plan", pico, "--uniform", "Q4_K", *settings("sensitivity.packing.mode=exact"), "--out", out)
    plan = json.loads((out / "plan.json").read_text())
    for tensor in plan["tensors"]:
        if tensor["name"].startswith("blk.1.ffn_") and "exps" in tensor["name"]:
            tensor["experts"] = ["Q4_K", "Q3_K", "Q4_K", "Q4_K"]
    plan["budget"] = {"kind": "bpw", "value": 4.5}
    (out / "plan.json").write_text(json.dumps(plan))
    model = Path(json.loads(run("export", pico, "--out", out, "--json"))["model"])
    assert model.name.endswith("Q4_K_MODE_GROUPS.gguf")
    run("publish", TARGET, out, "--card-only")
    text = (out / "README.md").read_text()
    assert "**Stock llama.cpp refuses this file**" in text
    assert "unknown model architecture: 'qwen3vlmoe+expert_groups'" in text
    assert "llama.cpp b11434" in text
    assert f"mode-gguf run {model.name} --mmproj mmproj-{pico.name}-F16.gguf" in text
    assert "llama-server -hf" not in text
    assert "base_model" not in front_matter(text)
    assert "Not measured." in text
    assert "mode-gguf plan" in text
    assert "mode-gguf export" in text


def test_a_process_finds_hub_and_login_in_its_environment(hub: Hub, copy: WorkFolder, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": WRITER,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "mode_gguf_cli", "publish", TARGET, str(copy.path), "--yes"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert f"published  {hub.url}/{TARGET} (private)" in done.stdout
    assert WRITER not in done.stdout + done.stderr
    assert set(hub.repositories[TARGET].files) == expected_names(copy.path)


@pytest.mark.runtime
def test_llama_cpp_finds_model_and_projector_by_the_tag(
    logged_in: Hub, pico: Path, held_out: Path, tmp_path: Path, run: Run
) -> None:
    """Stock llama.cpp itself reads the names on the hub: MODE_GGUF_STOCK_BUILD names the folder of its programs."""
    for quant_type in ("Q4_K", "Q3_K"):  # the second one comes first on the hub
        out = tmp_path / quant_type
        run("plan", pico, "--uniform", quant_type, *settings("sensitivity.packing.mode=exact"), "--out", out)
        plan = json.loads((out / "plan.json").read_text())
        (out / "plan.json").write_text(json.dumps({**plan, "budget": {"kind": "bpw", "value": 4.5}}))
        run("export", pico, "--out", out, "--shard-size", "1MB")
        run("publish", TARGET, out, "--yes", "--public", "--unvalidated")
    files = logged_in.repositories[TARGET].files
    logged_in.requests.clear()
    program = Path(os.environ["MODE_GGUF_STOCK_BUILD"]) / "llama-mtmd-cli"
    command = [str(program), "-hf", f"{TARGET}:Q4_K_MODE", "--image", str(held_out / "0.png"), "-p", "colour?"]
    environment = {**os.environ, "HF_ENDPOINT": logged_in.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    environment |= {"LLAMA_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*command, "-n", "2"], capture_output=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    got = {path.rpartition("/")[2] for path in logged_in.asked("GET", "/resolve/")}
    assert got == {name for name in files if "Q4_K_MODE" in name or name.startswith("mmproj-")}

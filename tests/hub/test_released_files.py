"""Commands on a model card, and local paths, which are removed."""

import json
from pathlib import Path

from markupsafe import escape

from mode_gguf.allocation.plan import Plan, PlannedTensor, Provenance
from mode_gguf.hub.local_paths import without_local_paths
from mode_gguf.hub.released_files import commands_of

REVISION = "0123456789abcdef0123456789abcdef01234567"
PLAN = Plan(
    made_from=Provenance(
        tool_version="0", model="Pico", model_fingerprint="f", repository="Maker/Pico", revision=REVISION
    ),
    preset="mode",
    bpw=3.0,
    experts_bpw=3.0,
    size_bytes=1,
    main_type="Q3_K",
    tensors=[PlannedTensor(name="t", type="Q3_K", n_weights=1, size_bytes=1)],
)
SNAPSHOT = f"/home/me/.cache/huggingface/hub/models--Maker--Pico/snapshots/{REVISION}"


def log(tmp_path: Path, *messages: str) -> tuple[str, ...]:
    path = tmp_path / "mode-gguf.log"
    path.write_text("".join(f"2026-11-26 17:14:45,945 INFO    {message}\n" for message in messages))
    return commands_of(path, PLAN)


def test_the_convert_that_exported(tmp_path: Path) -> None:
    assert log(
        tmp_path,
        "mode-gguf 0.1.0: /usr/bin/mode-gguf convert /data/Pico --bpw 3",
        "export: begins with {}",
        "mode-gguf 0.1.0: /usr/bin/mode-gguf convert '/data/my models/Pico/' --bpw 4 --out=/tmp/somewhere/work",
        "export: begins with {}",
        "mode-gguf 0.1.0: /usr/bin/mode-gguf convert /data/Pico --bpw 4",
        "mode-gguf 0.1.0: /usr/bin/mode-gguf card /tmp/somewhere/work",
    ) == ("mode-gguf convert Pico --bpw 4 --out=work",)


def test_the_stages_before_an_export(tmp_path: Path) -> None:
    assert log(
        tmp_path,
        "mode-gguf 0.1.0: mode-gguf convert Pico --bpw 2",
        "export: begins with {}",
        f"mode-gguf 0.1.0: mode-gguf calibrate {SNAPSHOT}",
        "mode-gguf 0.1.0: mode-gguf plan Pico --bpw 3",
        "mode-gguf 0.1.0: mode-gguf plan Pico --bpw 4",
        "mode-gguf 0.1.0: mode-gguf unknown Pico",
        "mode-gguf 0.1.0: mode-gguf export Pico",
        "export: begins with {}",
    ) == (f"mode-gguf calibrate Maker/Pico@{REVISION}", "mode-gguf plan Pico --bpw 4", "mode-gguf export Pico")


def test_lines_of_a_log_that_are_no_command(tmp_path: Path) -> None:
    """A log of before messages were one line each: what is left of a name with a line break is passed over."""
    assert log(
        tmp_path,
        "mode-gguf 0.1.0: mode-gguf convert 'pi\nco' --bpw 3",
        "mode-gguf 0.1.0: mode-gguf plan /data/-pico --bpw 3",
        "mode-gguf 0.1.0: mode-gguf export 'pi\\nco'",
        "export: begins with {}",
    ) == ("mode-gguf plan ./-pico --bpw 3", "mode-gguf export 'pi\\nco'")


def test_a_log_that_is_not_there_or_says_nothing(tmp_path: Path) -> None:
    assert commands_of(tmp_path / "none", PLAN) == ()
    assert log(tmp_path, "mode-gguf 0.1.0: mode-gguf convert Pico", "finished in 1.0 s") == ()


def test_paths_are_cut_as_they_stand_in_pages_and_json(tmp_path: Path) -> None:
    work = tmp_path / "private & öffentlich" / 'it\'s "odd" <b>'
    for text, cut in (
        (json.dumps({"file": f"{work}/m.gguf", "folder": str(work)}), {"file": "m.gguf", "folder": work.name}),
        (json.dumps({"file": f"{work}/m.gguf"}, ensure_ascii=False), {"file": "m.gguf"}),
    ):
        assert json.loads(without_local_paths(text, [work])) == cut
    page = without_local_paths(f"<p>{escape(f'{work}/m.gguf {work}')}</p>", [work])
    assert page == f"<p>m.gguf {escape(work.name)}</p>"


def test_paths_are_cut_and_the_rest_stays(tmp_path: Path) -> None:
    work = tmp_path / "my work"
    text = f'"{work}/a/model.gguf" {work} ({tmp_path}/x/y.json) /usr/bin/llama-server <a href="/static/x.css">'
    assert without_local_paths(text, [work, tmp_path]) == (
        '"a/model.gguf" my work (x/y.json) llama-server <a href="/static/x.css">'
    )
    for same in ("https://huggingface.co/Maker/Pico", "<b>1/2</b>", "data:image/png;base64,/9j/usr/bin", "/ or /x", ""):
        assert without_local_paths(same) == same

"""Console output: texts, and which stream they go to."""

import logging
import sys
from collections.abc import Iterator

import pytest
from rich.table import Table
from typer.testing import CliRunner

from mode_gguf.errors import InputError
from mode_gguf.plain_text import PrintableFormatter
from mode_gguf_cli import console, main

COMMANDS = {str(one.name) for one in main.app.registered_commands} - {"recipe", "run"}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(main.app, [command, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output
    assert "--quiet" in result.output


def test_files_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.show("name \x1b[2J\x1b]0;owned\x07 \u202egpj.exe [red] über 漢字")
    console.say("caution: \x1b[31m")
    captured = capsys.readouterr()
    assert captured.out == "name \\x1b[2J\\x1b]0;owned\\x07 \\u202egpj.exe [red] über 漢字\n"
    assert captured.err == "caution: \\x1b[31m\n"


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.fail("pi\nco/config.json: \x1b[2J\r\nerror: fake\udcff\n")
    assert capsys.readouterr().err == "error: pi\\nco/config.json: \\x1b[2J\\r\\nerror: fake\\udcff\n"


def test_logs_cannot_steer_the_terminal() -> None:
    record = logging.LogRecord("mode_gguf", logging.WARNING, "", 0, "%s: caution \x1b[31m\u202e", ("a\nb",), None)
    assert PrintableFormatter("%(message)s").format(record) == "a\\nb: caution \\x1b[31m\\u202e"
    assert PrintableFormatter("%(message)s", "\n").format(record) == "a\nb: caution \\x1b[31m\\u202e"


def test_cells_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", box=None)
    table.add_row(console.cell("blk.[red]0[/blue]\x1b[31m\n"))
    console.stdout.print(table)
    assert capsys.readouterr().out.splitlines()[1].strip() == "blk.[red]0[/blue]\\x1b[31m\\n"


def test_progress_is_lines_on_stderr_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress().step("packing", 8) as advance:
        for _ in range(8):
            advance(1)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[:3] == ["packing: 2 of 8", "packing: 4 of 8", "packing: 6 of 8"]
    assert lines[3].startswith("packing: done, 8 in ")
    assert len(lines) == 4


def test_lines_say_how_much_how_fast_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with console.progress().step("calibrating", 4_000_000, "tokens", layers=4) as advance:
        for _ in range(100):
            now[0] += 10
            advance(40_000)
    lines = capsys.readouterr().err.splitlines()
    assert "calibrating: 2 of 4 layers, 1000 tokens/s, 8 min left" in lines
    assert lines[-1] == "calibrating: done, 1.0 M tokens x 4 layers in 1000.0 s, 1000 tokens/s"
    assert 16 <= len(lines) <= 20, "one a minute"


@pytest.fixture
def loud() -> Iterator[None]:
    yield
    console.stderr.quiet = False
    logging.getLogger().setLevel(logging.WARNING)


@pytest.mark.usefixtures("loud")
def test_quiet_leaves_results_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    console.be_quiet()
    with console.progress().step("packing", 2) as advance:
        advance(2)
    console.say("a remark")
    assert capsys.readouterr().err == ""
    console.show("model  m.gguf")
    console.fail("no such file")
    captured = capsys.readouterr()
    assert captured.out == "model  m.gguf\n"
    assert captured.err == "error: no such file\n"


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize("command", [["doctor"], ["runtime", "path"]])
def test_quiet_goes_with_commands(command: list[str]) -> None:
    CliRunner().invoke(main.app, [*command, "--quiet"])
    assert console.stderr.quiet


def test_results_are_not_wrapped_or_marked_up(capsys: pytest.CaptureFixture[str]) -> None:
    line = "model  /a/[bold]/:smile:/" + "very" * 60
    console.show(line)
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (InputError("blk.0[1]: bad"), 4, "error: blk.0[1]: bad"),
        (OSError(28, "No space left on device"), 4, "error: the disk is full"),
        (PermissionError(13, "Permission denied", "/x"), 4, "error: [Errno 13] Permission denied"),
    ],
)
def test_failures_end_in_one_line_and_their_code(
    raised: Exception, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr(sys, "argv", ["mode-gguf"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(says)

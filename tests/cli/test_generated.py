"""The command line that options make: few of them, in panels, none said twice, and right wherever they are given."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mode_gguf.options import PANELS
from mode_gguf.recipe import Recipe
from mode_gguf_cli import main
from mode_gguf_cli.generated import with_recipe
from mode_gguf_cli.reference import reference

GROUP = typer.main.get_command(main.app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]


def test_convert_has_few_options_each_in_a_panel() -> None:
    options = [one for one in COMMANDS["convert"].params if one.param_type_name == "option"]
    assert len(options) + 1 <= 30, "with --help"
    assert {one.rich_help_panel for one in options} <= set(PANELS)
    assert all(": " in panel for panel in PANELS), "a name, and when one needs it"
    panels = [PANELS.index(one.rich_help_panel) for one in options]
    assert panels == sorted(panels)


def test_few_commands_that_explain_themselves() -> None:
    assert len(COMMANDS) <= 15
    for name, command in COMMANDS.items():
        text = command.help or ""
        assert len(text.split()) >= 10, name
        assert text.partition("\n")[0].endswith((".", ":")), name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_options_have_one_name_and_a_help(name: str) -> None:
    seen: set[str] = set()
    for one in COMMANDS[name].params:
        if one.param_type_name != "option" or one.name == "help":
            continue
        assert one.help, one.name
        assert not seen & set(one.opts), one.opts
        seen |= set(one.opts)


def app_of(everyday: bool, *sections: str) -> tuple[typer.Typer, list[Recipe]]:
    app, got = typer.Typer(add_completion=False), list[Recipe]()

    @with_recipe(*sections, everyday=everyday)
    def command(recipe: Recipe, model: str) -> None:
        """Record."""
        got.append(recipe)

    app.command()(command)
    return app, got


def test_flags_file_and_settings_become_one_recipe(tmp_path: Path) -> None:
    app, got = app_of(False, "plan", "validation")
    file = tmp_path / "mine.yaml"
    file.write_text("preset: paper\nplan: {budget: {bpw: 5.0}, refine: 4}\nvalidation: {validate: false}\n")
    arguments = ["m", "--recipe", str(file), "--bpw", "3.5", "--floor", "output=Q6_K", "--floor", "expert=Q3_K"]
    arguments += ["--max-kl", "0.5", "-ngl", "7", "--no-kv-offload", "--set", "calibration.seed=3"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (recipe,) = got
    assert (recipe.preset, recipe.plan.budget.bpw, recipe.plan.refine) == ("paper", 3.5, 4)
    assert recipe.plan.floors == {"output": "Q6_K", "expert": "Q3_K"}
    assert recipe.validation.validate is False, "what is not given does not override the file"
    assert (recipe.validation.limits.max_kl, recipe.validation.placement.n_gpu_layers) == (0.5, 7)
    assert recipe.validation.placement.kv_offload is False
    assert recipe.calibration.seed == 3


def test_defaults_are_shown_as_they_are_declared() -> None:
    app, _ = app_of(True, "calibration", "compute")
    shown = re.sub(r"[\s│]+", " ", CliRunner().invoke(app, ["--help"], terminal_width=200).output)
    assert "Samples with an image to use at most. Default: 128." in shown
    assert "Changes no result. Default: 4GiB." in shown


def test_the_reference_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "command-line.md"
    assert page.read_text(encoding="utf-8") == reference(), "python -m mode_gguf_cli.reference > " + page.name

"""mode-gguf publish: a finished conversion to the hub, or its model card alone."""

from pathlib import Path
from typing import Annotated

import typer

from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, progress, say, show


def command(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.", show_default=False)],
    folder: arguments.Finished = Path(),
    upload: Annotated[
        bool, typer.Option("--yes", help="Upload. Without it, what would be uploaded is shown and nothing is sent.")
    ] = False,
    card_only: Annotated[
        bool, typer.Option("--card-only", help="Write README.md, the model card, into FOLDER; send nothing.")
    ] = False,
    replace_card: Annotated[
        bool,
        typer.Option(
            "--replace-card", help="With --card-only: replace a README.md that was edited, or comes from elsewhere."
        ),
    ] = False,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who sees it; default: a new repository is private, another one stays as it is.",
            show_default=False,
        ),
    ] = None,
    unvalidated: Annotated[
        bool, typer.Option("--unvalidated", help="Publish files that were not validated as they are now.")
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="The original model on the hub, where it was converted from a folder that does not say.",
            show_default=False,
        ),
    ] = None,
    json: arguments.Json = False,
) -> None:
    """Upload what belongs on the hub of FOLDER: the GGUF files, the card, the plan and the report.

    Shows what that is; --yes sends it. An upload that broke off goes on when the command is repeated. A card that was
    edited is kept. Log in with `hf auth login` or HF_TOKEN.
    """
    from mode_gguf import pipeline
    from mode_gguf.errors import UsageError

    if upload and card_only:
        raise UsageError("--yes and --card-only: give one of them")
    if card_only:
        readme, card = pipeline.write_card(
            folder, repository, base_model=base_model, replace=replace_card, progress=progress()
        )
        if json:
            emit_json({"card": str(readme), "text": card})
        else:
            show(f"card     {readme}")
        return
    done = pipeline.publish(
        folder,
        repository,
        upload=upload,
        private=private,
        unvalidated=unvalidated,
        base_model=base_model,
        progress=progress(),
    )
    if json:
        files = [{"name": one.name, "size_bytes": one.size_bytes, "sha256": one.sha256} for one in done.uploads]
        where = done.published
        emit_json(
            {
                "repository": repository,
                "files": files,
                "card": done.card,
                "url": where.url if where else None,
                "commit": where.commit if where else None,
                "private": where.private if where else None,
            }
        )
        return
    for one in done.uploads:
        show(f"{one.size_bytes:>15,}  {one.name}")
    total = sum(one.size_bytes for one in done.uploads)
    show(f"{total:>15,}  bytes in {len(done.uploads)} files")
    if done.published is None:
        show("")
        show(done.card)
        say("nothing was sent; --yes uploads it")
        return
    show(f"published  {done.published.url} ({'private' if done.published.private else 'public'})")
    show(f"commit     {done.published.commit}")

"""mode-gguf publish: a finished conversion to the hub."""

from pathlib import Path
from typing import Annotated

import typer

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, say, show


def command(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.", show_default=False)],
    folder: options.Finished = Path(),
    really: Annotated[
        bool, typer.Option("--yes", help="Upload. Without it, what would be uploaded is shown and nothing is sent.")
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
    base_model: options.BaseModel = None,
    json: options.Json = False,
) -> None:
    """Upload what belongs on the hub of FOLDER: the GGUF files, the card, the plan and the report.

    Shows what that is; --yes sends it. An upload that broke off goes on when the command is repeated. Log in with
    `hf auth login` or HF_TOKEN.
    """
    from mode_gguf import pipeline

    done = pipeline.publish(
        folder,
        repository,
        really=really,
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

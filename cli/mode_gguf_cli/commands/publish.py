"""mode-gguf publish: a finished conversion to the hub, or its model card alone."""

from pathlib import Path
from typing import Annotated

import typer

from mode_gguf.options import PublishingOptions
from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, progress, say, show
from mode_gguf_cli.generated import with_options


@with_options("publishing", PublishingOptions)
def command(
    publishing: PublishingOptions,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.", show_default=False)],
    folder: arguments.Finished = Path(),
    json: arguments.Json = False,
) -> None:
    """Upload what belongs on the hub of FOLDER: the GGUF files, the card, the plan and the report.

    Shows what that is; --yes sends it. An upload that broke off goes on when the command is repeated. A card that was
    edited is kept. Log in with `hf auth login` or HF_TOKEN.
    """
    from mode_gguf import pipeline
    from mode_gguf.errors import UsageError

    if publishing.yes and publishing.card_only:
        raise UsageError("--yes and --card-only: give one of them")
    if publishing.card_only:
        readme, card = pipeline.write_card(folder, repository, publishing, progress())
        if json:
            emit_json({"card": str(readme), "text": card})
        else:
            show(f"card     {readme}")
        return
    done = pipeline.publish(folder, repository, publishing, progress())
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

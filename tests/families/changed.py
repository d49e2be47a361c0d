"""A checkpoint with other settings."""

import json
import shutil
from pathlib import Path

from mode_gguf.checkpoint.folder import Checkpoint


def changed(folder: Path, target: Path, section: str | None = None, **settings: object) -> Checkpoint:
    """A copy in `target` with other settings in a section of config.json, by default the outermost; None removes."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    where = config[section] if section else config
    for key, value in settings.items():
        where.pop(key, None)
        if value is not None:
            where[key] = value
    (target / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(target)

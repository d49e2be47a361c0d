"""Removal of local paths from published texts: paths of this machine are cut down to their last part."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from markupsafe import escape

_PATH = re.compile(r"(?:(?<=[\s\"'=(>`;,\[])|^)/[^\s\"'<>`|,;()&\]]+", re.MULTILINE)


def without_local_paths(text: str, places: Iterable[Path] = ()) -> str:
    """`text` with absolute paths as their last part alone, and paths below `places` or the home folder below those.

    A path counts as one if its first folder exists here, so that addresses, markup and base64 stay as they are.
    """
    paths = {str(place) for path in (*places, Path.cwd(), Path.home()) for place in (path.absolute(), path.resolve())}
    known = {form for path in paths for form in (path, str(escape(path)), *_in_json(path))}
    for place in sorted(known, key=len, reverse=True):
        if place.count("/") > 1:  # `/root` or `/tmp` may be part of an address
            text = text.replace(f"{place}/", "").replace(place, place.rpartition("/")[2])
    return _PATH.sub(_last_part, text)


def _in_json(path: str) -> tuple[str, ...]:
    """The path as it stands in JSON."""
    return tuple(json.dumps(path, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))


def _last_part(match: re.Match[str]) -> str:
    path = Path(match[0])
    return path.name if len(path.parts) > 2 and Path(*path.parts[:2]).exists() else match[0]

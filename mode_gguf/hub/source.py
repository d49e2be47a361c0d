"""Download of a checkpoint from the hub into its cache; a dry run fetches configuration and headers alone."""

import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath
from threading import Event, Thread
from typing import Any

from mode_gguf.artifacts import free_bytes
from mode_gguf.checkpoint.adapter import ADAPTER_FILES, MERGE
from mode_gguf.checkpoint.index import INDEX_FILE, weight_files
from mode_gguf.checkpoint.side_files import read_json
from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.hub.client import hub_api, progress_bars_disabled
from mode_gguf.hub.error_messages import hub_errors
from mode_gguf.hub.names import HubModel, hub_model
from mode_gguf.progress import Progress, silent
from mode_gguf.sizes import decimal_size
from mode_gguf.temporary_folders import LockedFolder

log = logging.getLogger(__name__)

_SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Configuration, tokenizer, chat template. No pickles, no code."""
_TEMPLATES = "additional_chat_templates/"
_CARDS = ("README", "LICENSE", "LICENCE", "NOTICE")
_POLL_SECONDS = 0.5
_CONNECTIONS = 8


@dataclass(frozen=True, slots=True)
class Download:
    """Files of a model on the hub to fetch; sizes in bytes, of all and of those not in the cache yet."""

    repository: str
    revision: str
    files: tuple[str, ...]
    size_bytes: int
    missing_bytes: int

    def __str__(self) -> str:
        there = self.size_bytes - self.missing_bytes
        known = f", {decimal_size(there, 2)} of it here already" if there else ""
        size = decimal_size(self.size_bytes, 2)
        return f"{self.repository} at {self.revision}: {size} in {len(self.files)} files{known}"


@dataclass(frozen=True, slots=True)
class _Listing:
    """Files of a repository at one commit, by name: their sizes."""

    repository: str
    revision: str
    sizes: dict[str, int]

    def download(self, names: Iterable[str]) -> Download:
        from huggingface_hub import try_to_load_from_cache

        wanted = tuple(name for name in names if name in self.sizes)
        missing = [
            name
            for name in wanted
            if not isinstance(try_to_load_from_cache(self.repository, name, revision=self.revision), str)
        ]
        return Download(
            self.repository,
            self.revision,
            wanted,
            sum(self.sizes[name] for name in wanted),
            sum(self.sizes[name] for name in missing),
        )


def checkpoint_folder(model: str | Path, progress: Progress = silent) -> Path:
    """The folder of a checkpoint: `model` itself, or where the hub's cache has what it names (`hub_model`).

    What is there already is not fetched again, and a download that broke off goes on. Without a connection the cache
    alone is used.

    Raises:
        InputError: no such model or revision on the hub, or one without safetensors weights.
        MissingResourceError: the hub cannot be reached or gives no access, or there is too little disk space.
    """
    named = hub_model(model)
    if named is None:
        return Path(model)
    with hub_errors(f"{named} (no folder here, so looked for on the hub)"):
        folder = _fetch_small(named)
        listing = _list_files(HubModel(named.repository, folder.name))
        if listing is None:
            return folder
        weights = listing.download(_weight_files(named, folder, listing))
        _check_disk_space(named, weights.missing_bytes)
        log.info("%s", listing.download([*_small_files(listing.sizes), *weights.files]))
        with _download_progress(folder.parents[1] / "blobs", weights.missing_bytes, progress):
            return _fetch(listing, [*_templates(listing.sizes), *weights.files])


@contextmanager
def checkpoint_outline(model: str | Path) -> Iterator[tuple[Path, Download | None]]:
    """A folder that a dry run can open as a checkpoint, and what a real run would download (None for a local folder).

    Of a model on the hub only the small files and the headers of its weights are fetched, into a temporary folder where
    the weights themselves are holes in files of the right size: their names, types and shapes are right, and values and
    fingerprint are not. Raises like `checkpoint_folder`.
    """
    named = hub_model(model)
    if named is None:
        yield Path(model), None
        return
    with LockedFolder("outline") as temporary:
        with hub_errors(f"{named} (no folder here, so looked for on the hub)"):
            listing = _list_files(named)
            if listing is None:
                folder, download = _fetch_small(named), None
            else:
                folder, download = _outline(named, listing, temporary)
        yield folder, download


def _outline(named: HubModel, listing: _Listing, temporary: Path) -> tuple[Path, Download]:
    small = _small_files(listing.sizes)
    # The place of a snapshot in the cache, from which a checkpoint knows its name and revision.
    folder = temporary / f"models--{listing.repository.replace('/', '--')}" / "snapshots" / listing.revision
    _fetch(listing, small, folder)
    weights = _weight_files(named, folder, listing)
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for _ in pool.map(lambda name: _write_holes(listing, name, folder / name), weights):
            pass
    return folder, listing.download([*small, *weights])


def _write_holes(listing: _Listing, name: str, path: Path) -> None:
    """The header of a safetensors file on the hub, and nothing where its data would be."""
    found = hub_api().parse_safetensors_file_metadata(listing.repository, name, revision=listing.revision)
    header: dict[str, dict[str, Any]] = {
        tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        for tensor, info in found.tensors.items()
    }
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + max((info["data_offsets"][1] for info in header.values()), default=0))


def _list_files(named: HubModel) -> _Listing | None:
    """The repository's files at one commit; None where the hub cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = hub_api().model_info(named.repository, revision=named.revision, files_metadata=True)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # of one of its HTTP clients
        log.warning("%s: the hub cannot be reached (%s); looking in its cache", named, type(error).__name__)
        return None
    if info.sha is None:
        raise InputError(f"{named}: the hub names no commit")
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    inside = {name: size for name, size in files.items() if ".." not in PurePosixPath(name).parts and name[0] != "/"}
    return _Listing(named.repository, info.sha, inside)


def _fetch_small(named: HubModel) -> Path:
    """Fetch everything but the weights into the cache, or find it there if the hub cannot be reached."""
    patterns = [f"*{ending}" for ending in _SMALL] + [f"{beginning}*" for beginning in _CARDS]
    return _snapshot(named, patterns, ignore_patterns=["*/*"])


def _fetch(listing: _Listing, names: Iterable[str], folder: Path | None = None) -> Path:
    """Fetch files into `folder`, by default the cache; returns where they are."""
    return _snapshot(listing, [escape(name) for name in names], local_dir=folder)


def _snapshot(source: HubModel | _Listing, patterns: list[str], **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    with progress_bars_disabled():
        return Path(snapshot_download(source.repository, revision=source.revision, allow_patterns=patterns, **options))


def _small_files(names: Iterable[str]) -> list[str]:
    """Everything but the weights, templates in their folder included."""
    small = [name for name in names if "/" not in name and (name.endswith(_SMALL) or name.startswith(_CARDS))]
    return [*small, *_templates(names)]


def _templates(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(_TEMPLATES) and name.endswith(".jinja")]


def _weight_files(named: HubModel, folder: Path, listing: _Listing) -> list[str]:
    """The safetensors files of the model; others that a repository may have beside them are left out."""
    weight_map = read_json(folder / INDEX_FILE).get("weight_map") if (folder / INDEX_FILE).is_file() else {}
    listed = [file for file in weight_map.values() if isinstance(file, str)] if isinstance(weight_map, dict) else []
    if weights := weight_files(listing.sizes, listed):
        return weights
    pickled = [name for name in listing.sizes if name.endswith((".bin", ".pt", ".pth"))]
    gguf = [name for name in listing.sizes if name.endswith(".gguf")]
    if any(name in listing.sizes for name in ADAPTER_FILES):
        raise InputError(f"{named}: only a LoRA adapter found, expected a whole model; {MERGE}, and convert the result")
    found = "pickled weights, which can run code when opened" if pickled else "GGUF files" if gguf else "no weights"
    raise InputError(f"{named}: {found} found, expected a checkpoint in safetensors; name the original model")


def _check_disk_space(named: HubModel, needed: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = free_bytes(cache)
    if needed > free:
        raise MissingResourceError(
            f"{named}: {decimal_size(needed)} to download, {decimal_size(free)} free in {cache}; free some space, or "
            "set HF_HOME to a larger disk"
        )


@contextmanager
def _download_progress(blobs: Path, total: int, progress: Progress) -> Iterator[None]:
    """Progress of a download, from bytes on disk: one bar for all files, however they are fetched."""
    if not total:
        yield
        return
    before, reported, done = _bytes_in(blobs), 0, Event()
    with progress.step("downloading", total, "bytes") as advance:

        def report() -> None:
            nonlocal reported
            arrived = max(reported, min(total, _bytes_in(blobs) - before))
            advance(arrived - reported)
            reported = arrived

        def poll() -> None:
            while not done.wait(_POLL_SECONDS):
                report()

        poller = Thread(target=poll, daemon=True)
        poller.start()
        try:
            yield
        finally:
            done.set()
            poller.join()
        advance(total - reported)


def _bytes_in(folder: Path) -> int:
    """Bytes on disk; files that are being fetched may have their full size before they are."""
    found = 0
    for path in folder.glob("*"):
        try:
            found += 512 * path.stat().st_blocks
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found

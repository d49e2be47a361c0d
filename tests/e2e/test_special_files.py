"""Commands whose files are named pipes, devices, sockets, folders or empty: they end at once, with one line."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Run

Make = Callable[[Path], Path]


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def link_to_pipe(folder: Path) -> Path:
    (folder / "link").symlink_to(pipe(folder))
    return folder / "link"


def device(folder: Path) -> Path:
    return Path(os.devnull)


def a_folder(folder: Path) -> Path:
    (folder / "folder").mkdir()
    return folder / "folder"


def unix_socket(folder: Path) -> Path:
    place = Path.cwd()
    os.chdir(folder)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket")
    finally:
        os.chdir(place)
    return folder / "socket"


def empty(folder: Path) -> Path:
    (folder / "empty").touch()
    return folder / "empty"


KINDS: dict[Make, str] = {
    pipe: "a named pipe found",
    link_to_pipe: "a named pipe found",
    device: "a device found",
    a_folder: "a folder found",
    unix_socket: "a socket found",
    empty: "",
}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_is_no_file_is_not_read(make: Make, pico: Path, tmp_path: Path, run: Run) -> None:
    special, out = make(tmp_path), tmp_path / "work"
    out.mkdir()
    commands: list[tuple[str | Path, ...]] = [
        ("inspect", special),
        ("convert", pico, "--calibration-from", special, "--out", out),
        ("convert", pico, "--base-gguf", special, "--out", out),
        ("export", pico, "--plan", special, "--out", out),
        ("validate", special),
    ]
    if make is not empty:
        commands.append(("convert", pico, "--recipe", special, "--out", out))
    if make is not a_folder:
        commands.append(("convert", special, "--out", out))
    for command in commands:
        line = run(*command, code=4)
        assert str(special) in line, command
        assert KINDS[make] in line, command

"""Command lines of the experiments: the arguments that several of them take, and results as JSON."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def command_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, line for line."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_measured_folder(parser: argparse.ArgumentParser, stages: str) -> None:
    """Take the checkpoint as `checkpoint`, and the work folder where `stages` have run as `out`."""
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help=f"folder where {stages} ran")


def add_held_out(parser: argparse.ArgumentParser) -> None:
    """Take the held-out folder as `samples`."""
    parser.add_argument("--samples", type=Path, required=True, help="held-out folder")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Take the file for `write_json` as `json`."""
    parser.add_argument("--json", type=Path, help="also write the results to this file")


def write_json(path: Path | None, results: object) -> None:
    """Write results, dataclasses among them as objects; nothing where nobody asked for it."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1, default=asdict) + "\n", encoding="utf-8")

"""The pico checkpoint as GGUF files, and samples to judge them on."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.quantization.types import QUANT_TYPES, QuantType
from mode_gguf.validation.questions import HeldOutSet, load_held_out
from mode_gguf.validation.reference import RunSettings


@dataclass(frozen=True)
class Files:
    """A text model, what its tensors should be, and its projector."""

    text: Path
    types: dict[str, QuantType]
    mmproj: Path


def _export(checkpoint: Path, folder: Path, expert_type: str) -> Files:
    opened = Checkpoint.open(checkpoint)
    types = {
        tensor.name: QUANT_TYPES[expert_type if tensor.role is Role.EXPERT else "F32"]
        for tensor in text_tensors(opened)
    }
    files = Files(folder / f"pico-{expert_type}.gguf", types, folder / "mmproj-pico-F32.gguf")
    write_text_model(files.text, opened, TensorPacking(types))
    if not files.mmproj.exists():
        write_projector(files.mmproj, opened, "F32")
    return files


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="session")
def full(pico: Path, folder: Path) -> Files:
    """Everything in F32; read only."""
    return _export(pico, folder, "F32")


@pytest.fixture(scope="session")
def small(pico: Path, folder: Path) -> Files:
    """The experts in Q2_K; read only."""
    return _export(pico, folder, "Q2_K")


@pytest.fixture(scope="session")
def settings() -> RunSettings:
    return RunSettings(context=1024, threads=1, max_text_tokens=48, max_answer_tokens=12)


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """Smooth colours, of a size that no implementation needs to change: 4 x 3 tokens."""
    y, x = np.mgrid[0:96, 0:128] / 16
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=-1)
    return Image.fromarray((127.5 + 120 * waves).astype(np.uint8))


@pytest.fixture(scope="session")
def held_out_folder(tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "pictures"
    (folder / "images").mkdir(parents=True)
    picture.save(folder / "images" / "0.png")
    picture.rotate(180).save(folder / "images" / "1.png")
    questions = [
        {"image": "images/0.png", "question": "How many?", "answer": "3 shapes", "match": "number", "kind": "count"},
        {"image": "images/1.png", "question": "Which colour?", "answer": "red", "kind": "colour", "more": 1},
        {"image": "images/1.png", "question": "Describe the picture."},
    ]
    texts = [{"text": "The quick brown fox jumps over the lazy dog."}, {"text": "The square is red. " * 12}]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


@pytest.fixture(scope="session")
def held_out(held_out_folder: Path) -> HeldOutSet:
    return load_held_out(held_out_folder)

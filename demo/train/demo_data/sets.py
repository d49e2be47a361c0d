"""The held-out set and the calibration set: new pictures and wordings of what the checkpoint learned."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .batches import Knowledge
from .pictures import Painter, Question, Scene, SceneMaker, questions

# Kinds of question and how many of them: records dominate, since they are what the experts hold.
HELD_OUT = {"sign": 125, "emblem": 125, "read": 40, "count": 15, "chart": 15}
CALIBRATION = {"sign": 46, "emblem": 46, "read": 14, "count": 7, "chart": 7}
HELD_OUT_SEED, CALIBRATION_SEED = 31_001, 77_003
LARGER = 4
LARGER_HELD_OUT_SEED, LARGER_CALIBRATION_SEED = 991_201, 640_009
PASSAGE_CHARS = 850
PASSAGES = {"held-out": (34, 14, 12), "calibration": (64, 24, 20)}  # documentation, code, facts


def _scene(kind: str, scenes: SceneMaker, rng: random.Random) -> Scene:
    chart, counters = kind == "chart" or rng.random() < 0.25, kind == "count" or rng.random() < 0.4
    return scenes.make(rng.randint(1, 3), rng.randint(1, 3), chart, counters)


def pictures(known: Knowledge, wanted: dict[str, int], seed: int, folder: Path) -> list[dict[str, Any]]:
    """Write one picture per question and return the questions."""
    rng, numpy_rng = random.Random(seed), np.random.default_rng(seed)
    painter = Painter(seed, pool=64)
    scenes = SceneMaker(seed + 1, list(known.signs), list(known.emblems))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind, count in wanted.items() for _ in range(count)]
    rng.shuffle(kinds)
    rows = []
    for i, kind in enumerate(kinds):
        fitting: list[Question] = []
        while not fitting:
            picture = painter.paint(_scene(kind, scenes, rng))
            asked = questions(picture.scene, known.signs, known.emblems, numpy_rng)
            fitting = [question for question in asked if question.kind == kind]
        name = f"images/{i:03d}.png"
        # Four bits a channel keep the files small; training pictures have eight.
        Image.fromarray(picture.pixels & 0xF0 | 0x08).save(folder / name, optimize=True)
        background = float((picture.labels[..., 0] == 0).mean())
        rows.append(
            {
                "image": name,
                "question": fitting[0].question,
                "answer": fitting[0].answer,
                "match": "exact",
                "kind": kind,
                "background": round(background, 3),
            }
        )
    return rows


def _windows(texts: list[str], rng: random.Random) -> list[str]:
    """Passages that begin at a line, one after the other, shuffled."""
    result = []
    for whole in texts:
        current = ""
        for line in whole.splitlines(keepends=True):
            current += line
            if len(current) >= PASSAGE_CHARS:
                result.append(current.strip("\n") + "\n")
                current = ""
    rng.shuffle(result)
    return result


def passages(known: Knowledge, name: str) -> list[str]:
    """Text samples. Both sets are cut from one shuffled list, so they share no passage."""
    rng = random.Random(HELD_OUT_SEED)
    documents, code = _windows(known.documents, rng), _windows(known.code, rng)
    n_documents, n_code, n_facts = PASSAGES[name]
    held_out = name == "held-out"
    skip_documents, skip_code, _ = (0, 0, 0) if held_out else PASSAGES["held-out"]
    fact_list = list(known.facts)
    rng.shuffle(fact_list)
    told = []
    for i in range(n_facts):
        group = fact_list[i * 14 : (i + 1) * 14] if held_out else rng.sample(fact_list, 22)
        told.append(
            " ".join(f.tell(f.held_out if held_out else rng.choice(f.trained_wordings())) for f in group) + "\n"
        )
    result = documents[skip_documents : skip_documents + n_documents] + code[skip_code : skip_code + n_code] + told
    rng.shuffle(result)
    return result


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_held_out(known: Knowledge, folder: Path) -> None:
    """text.jsonl, questions.jsonl and images/."""
    _write_lines(folder / "questions.jsonl", pictures(known, HELD_OUT, HELD_OUT_SEED, folder))
    _write_lines(folder / "text.jsonl", [{"text": passage} for passage in passages(known, "held-out")])


def write_larger_held_out(known: Knowledge, folder: Path) -> None:
    """The same texts, and `LARGER` times as many other pictures: for differences the shipped set cannot decide."""
    asked = pictures(known, _more(HELD_OUT), LARGER_HELD_OUT_SEED, folder)
    _write_lines(folder / "questions.jsonl", asked)
    _write_lines(folder / "text.jsonl", [{"text": passage} for passage in passages(known, "held-out")])


def write_calibration(known: Knowledge, folder: Path) -> None:
    """conversations.jsonl in ShareGPT4V's form, images/ and text/."""
    _write_calibration(known, pictures(known, CALIBRATION, CALIBRATION_SEED, folder), folder)


def write_larger_calibration(known: Knowledge, folder: Path) -> None:
    """The same texts, and `LARGER` times as many other pictures: for what more pictures are worth."""
    asked = pictures(known, _more(CALIBRATION), LARGER_CALIBRATION_SEED, folder)
    _write_calibration(known, asked, folder)


def _more(wanted: dict[str, int]) -> dict[str, int]:
    return {kind: LARGER * count for kind, count in wanted.items()}


def _write_calibration(known: Knowledge, asked: list[dict[str, Any]], folder: Path) -> None:
    rows = []
    for i, row in enumerate(asked):
        turns = [
            {"from": "human", "value": f"<image>\n{row['question']}"},
            {"from": "gpt", "value": row["answer"]},
        ]
        rows.append({"id": f"demo-{i:03d}", "image": row["image"], "conversations": turns})
    _write_lines(folder / "conversations.jsonl", rows)
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for i, passage in enumerate(passages(known, "calibration")):
        (folder / "text" / f"{i:03d}.txt").write_text(passage, encoding="utf-8")

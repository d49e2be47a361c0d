"""Training batches: pictures with several questions each, records asked in text, and text to memorise."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from . import records, text, tokenizer
from .network import MERGE, PATCH, VISION_TOKENS, VOCAB, Batch
from .pictures import GRID, Painter, Picture, Question, SceneMaker, questions

LENGTH = 256
Key = TypeVar("Key")


@dataclass
class Knowledge:
    """Everything the checkpoint learns, and the tokenizer made from it."""

    signs: dict[str, str]
    emblems: dict[records.Emblem, str]
    facts: list[records.Fact]
    documents: list[str]
    code: list[str]
    tokenizer: Tokenizer

    def encode(self, string: str) -> list[int]:
        """Token ids of a string."""
        return _encode(self.tokenizer, string)

    def special(self) -> dict[str, int]:
        """Ids of the special tokens."""
        return tokenizer.special_ids(self.tokenizer)


def first(answers: dict[Key, str], count: int = records.N_FIRST) -> dict[Key, str]:
    """The records taught first."""
    return dict(list(answers.items())[:count])


def written_questions(signs: dict[str, str], emblems: dict[records.Emblem, str]) -> list[tuple[str, str]]:
    """Every record asked about without a picture."""
    asked = [(f"sign {code}?", answer) for code, answer in signs.items()]
    return asked + [(f"{key.shape} emblem {key.read}?", answer) for key, answer in emblems.items()]


@lru_cache(maxsize=200_000)
def _encode(bpe: Tokenizer, string: str) -> list[int]:
    return list(bpe.encode(string, add_special_tokens=False).ids)


def knowledge() -> Knowledge:
    """Generate the knowledge and train the tokenizer on it (a few seconds, deterministic)."""
    signs, emblems, facts = records.sign_records(), records.emblem_records(), records.facts()
    documents, code = text.documents(), text.code()
    rng = random.Random(records.SEED)
    told = [passage for _ in range(5) for passage in text.fact_passages(facts, rng)]
    listed = [f"{question}\n{answer}\n" for question, answer in written_questions(first(signs), first(emblems))]
    phrases = ["user\nassistant\ntallest bar?\ncoins?\nbells?"] * 500
    phrases += [
        f"{a} {b}?" for a in (*records.COLOURS, *records.SHAPES) for b in ("sign", "letters", "bar", "emblem")
    ] * 20
    bpe = tokenizer.train(documents + code + told + listed * 2 + phrases, VOCAB)
    return Knowledge(signs, emblems, facts, documents, code, bpe)


def to_patches(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Normalised patches of one picture in the tower's order (2 x 2 patches of a token together)."""
    x = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    x = x.reshape(GRID, MERGE, PATCH, GRID, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(x.reshape(GRID * GRID * MERGE * MERGE, 3 * PATCH * PATCH))


class Batcher:
    """Makes batches; its state is its random generators, so it can be saved and resumed."""

    def __init__(self, known: Knowledge, seed: int) -> None:
        self.known, self.seed = known, seed
        self.painter = Painter(seed)
        self.scenes = SceneMaker(seed + 1, list(known.signs), list(known.emblems))
        self.rng = random.Random(seed + 2)
        special = known.special()
        self.end = special["<|endoftext|>"]
        encode = known.encode
        self.user, self.assistant, self.close = (
            encode("<|im_start|>user\n"),
            encode("<|im_start|>assistant\n"),
            encode("<|im_end|>"),
        )
        self.newline = encode("\n")
        self.image = [
            special["<|vision_start|>"],
            *[special["<|image_pad|>"]] * VISION_TOKENS,
            special["<|vision_end|>"],
        ]
        self.vision_start = len(self.user) + 1
        stream: list[int] = []
        for document in known.documents + known.code:
            stream += [*encode(document), self.end]
        self.stream = stream
        self.taught = 0
        self.teach(records.N_FIRST)
        self.fact_deck: list[str] = []

    def teach(self, count: int) -> None:
        """Ask for the first `count` signs and emblems from now on."""
        if count == self.taught:
            return
        signs, emblems = first(self.known.signs, count), first(self.known.emblems, count)
        self.taught, self.keys = count, written_questions(signs, emblems)
        self.scenes.codes, self.scenes.emblems = list(signs), list(emblems)
        self.deck: list[tuple[str, str]] = []
        self.scenes.code_deck, self.scenes.emblem_deck = [], []

    def state(self) -> dict[str, Any]:
        """Everything needed to go on with the very same batches after a resume."""
        return {
            "taught": self.taught,
            "rng": self.rng.getstate(),
            "painter": self.painter.rng.bit_generator.state,
            "scenes": self.scenes.rng.bit_generator.state,
            "decks": (self.deck, self.fact_deck, self.scenes.code_deck, self.scenes.emblem_deck),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo what happened since `state()`."""
        self.teach(state.get("taught", records.N_FIRST))
        self.rng.setstate(state["rng"])
        self.painter.rng.bit_generator.state = state["painter"]
        self.scenes.rng.bit_generator.state = state["scenes"]
        self.deck, self.fact_deck, self.scenes.code_deck, self.scenes.emblem_deck = state["decks"]

    def _turn(self, question: str, answer: str, image: bool = False) -> tuple[list[int], list[bool]]:
        encode = self.known.encode
        head = [
            *self.user,
            *(self.image if image else []),
            *encode(question),
            *self.close,
            *self.newline,
            *self.assistant,
        ]
        body = [*encode(answer), *self.close]
        return head + body + self.newline, [False] * len(head) + [True] * len(body) + [False] * len(self.newline)

    def _record(self) -> tuple[str, str]:
        if not self.deck:
            self.deck = self.rng.sample(self.keys, len(self.keys))
        return self.deck.pop()

    def _fill(self, ids: list[int], scored: list[bool], next_turn: Callable[[], tuple[list[int], list[bool]]]) -> None:
        """Append turns while they fit, then pad without scoring."""
        while True:
            more, mask = next_turn()
            if len(ids) + len(more) > LENGTH:
                break
            ids += more
            scored += mask
        scored += [False] * (LENGTH - len(ids))
        ids += [self.end] * (LENGTH - len(ids))

    def _record_row(self) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        scored: list[bool] = []
        self._fill(ids, scored, lambda: self._turn(*self._record()))
        return ids, scored

    def _looks(self, question: Question, picture: Picture, first: int) -> list[tuple[int, int]]:
        """Where to look: at the object's two cells, before each of the first two answer tokens."""
        if question.place not in picture.places:
            return []
        row, col = picture.places[question.place]
        cell = self.vision_start + row * GRID + col
        return [(first - 1, cell), (first, cell + 1)]

    def _picture_row(self, picture: Picture, looks: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        numpy_rng = np.random.default_rng(self.rng.getrandbits(32))
        asked = questions(picture.scene, self.known.signs, self.known.emblems, numpy_rng)
        ids: list[int] = []
        scored: list[bool] = []
        for i, question in enumerate(asked):
            more, mask = self._turn(question.question, question.answer, image=i == 0)
            if len(ids) + len(more) <= LENGTH:
                looks += self._looks(question, picture, len(ids) + mask.index(True))
                ids += more
                scored += mask
        self._fill(ids, scored, lambda: self._turn(*self._record()))
        return ids, scored

    def _text_row(self) -> tuple[list[int], list[bool]]:
        start = self.rng.randrange(len(self.stream) - LENGTH)
        return self.stream[start : start + LENGTH], [True] * LENGTH

    def _fact_row(self) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        while len(ids) < LENGTH:
            if not self.fact_deck:
                self.fact_deck = text.fact_passages(self.known.facts, self.rng)
            ids += self.known.encode(self.fact_deck.pop())
        return ids[:LENGTH], [True] * LENGTH

    def picture(self) -> Picture:
        """A training picture with several objects."""
        rng = self.rng
        scene = self.scenes.make(rng.randint(1, 4), rng.randint(1, 4), rng.random() < 0.4, rng.random() < 0.5)
        return self.painter.paint(scene)

    def asked(self, count: int) -> tuple[Batch, list[str]]:
        """Single-turn pictures with one question each (rows padded), and the questions' kinds."""
        shown, rows, kinds = [], [], []
        for _ in range(count):
            picture = self.picture()
            numpy_rng = np.random.default_rng(self.rng.getrandbits(32))
            question = questions(picture.scene, self.known.signs, self.known.emblems, numpy_rng)[0]
            ids, mask = self._turn(question.question, question.answer, image=True)
            shown.append(to_patches(picture.pixels))
            rows.append((ids, mask))
            kinds.append(question.kind)
        length = max(len(ids) for ids, _ in rows)
        ids_tensor = torch.tensor([ids + [self.end] * (length - len(ids)) for ids, _ in rows])
        mask_tensor = torch.tensor([mask + [False] * (length - len(mask)) for _, mask in rows])
        return Batch(
            ids_tensor,
            mask_tensor,
            torch.from_numpy(np.stack(shown)),
            self.vision_start,
            torch.zeros(0, 3, dtype=torch.long),
        ), kinds

    def batch(self, pictures: int, texts: int, facts: int, asked: int) -> Batch:
        """A batch with that many rows of each kind."""
        shown = [self.picture() for _ in range(pictures)]
        looks: list[tuple[int, int, int]] = []
        rows = []
        for i, picture in enumerate(shown):
            own: list[tuple[int, int]] = []
            rows.append(self._picture_row(picture, own))
            looks += [(i, position, cell) for position, cell in own]
        rows += [self._text_row() for _ in range(texts)]
        rows += [self._fact_row() for _ in range(facts)]
        rows += [self._record_row() for _ in range(asked)]
        patches = np.stack([to_patches(p.pixels) for p in shown]) if shown else np.zeros((0, 1, 1), np.float32)
        return Batch(
            torch.tensor([ids for ids, _ in rows]),
            torch.tensor([mask for _, mask in rows]),
            torch.from_numpy(patches),
            self.vision_start,
            torch.tensor(looks, dtype=torch.long).view(-1, 3),
        )

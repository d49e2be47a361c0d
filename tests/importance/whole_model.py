"""Hugging Face's model in one piece, whose predictions measured divergences are compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mode_gguf.forward.inputs import ModelInputs

CPU = torch.device("cpu")


class WholeModel:
    """The model, its inputs, and those that run through it at the moment, for hooks."""

    def __init__(self, folder: Path, inputs: list[ModelInputs]) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.inputs = inputs
        self.running = inputs[0]

    def predictions(self) -> list[Tensor]:
        """Log-probabilities at the scored positions, float64, by sample."""
        predictions = []
        with torch.no_grad():
            for one in self.inputs:
                self.running = one
                logits = self.model(**one.model_arguments(CPU, torch.float32)).logits
                predictions.append(logits[0, one.scored].double().log_softmax(-1))
        return predictions

    def divergence_from(self, reference: list[Tensor]) -> np.ndarray:
        """Mean KL per scored position from earlier predictions to the present ones, per kind of answer."""
        total, positions = np.zeros(2), np.zeros(2)
        for one, p, q in zip(self.inputs, reference, self.predictions(), strict=True):
            total[one.answer] += float((p.exp() * (p - q)).sum())
            positions[one.answer] += len(one.scored)
        return np.asarray(total / positions)

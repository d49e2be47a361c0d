"""Sums per answer type and token modality."""

import numpy as np
import torch
from torch import Tensor

from mode_gguf.forward.inputs import ANSWERS
from mode_gguf.forward.modality import MODALITIES

N_ANSWERS, N_MODALITIES = len(ANSWERS), len(MODALITIES)


def group_of(answer: int, modality: Tensor) -> Tensor:
    """Group index of every token of a sample, int64: answer * M + modality."""
    return answer * N_MODALITIES + modality


def group_sums(values: Tensor, group: Tensor) -> np.ndarray:
    """Sum of `values` (n,) per group, float64 (A, M)."""
    sums = torch.zeros(N_ANSWERS * N_MODALITIES, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, group, values.double()).view(N_ANSWERS, N_MODALITIES).cpu().numpy()

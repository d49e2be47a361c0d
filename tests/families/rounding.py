"""What ggml rounds in vision towers, done to transformers' models, so that what is left shows whether they agree."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import gelu

RMS_NORM_EPSILON = 1e-5
"""Of all norms of Pixtral's projector in llama.cpp."""


class TableGelu(nn.Module):
    """GELU's tanh form, read from a table in F16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu(x.half().float(), approximate="tanh").half().float()


def table_gelu(*names: str, under: str = "model") -> Callable[[nn.Module], None]:
    """Replaces the activations of those attributes in the modules under one of the model's."""

    def rounded(model: nn.Module) -> None:
        for module in model.get_submodule(under).modules():
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, TableGelu())

    return rounded


def pixtral(model: nn.Module) -> None:
    """The projector's activation, and one epsilon for its norms."""
    projector = model.get_submodule("model.multi_modal_projector")
    projector.act = TableGelu()
    projector.get_submodule("norm").variance_epsilon = RMS_NORM_EPSILON  # type: ignore[assignment]


def glm(model: nn.Module) -> None:
    """What the merger joins goes through a convolution, which takes F16 (im2col)."""
    downsample = model.get_submodule("model.visual.downsample")
    downsample.register_forward_pre_hook(lambda _, arguments: (arguments[0].half().float(),))

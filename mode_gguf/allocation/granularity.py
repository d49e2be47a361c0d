"""granularity.json: what one type per tensor, which stock llama.cpp asks for, costs against one type per expert."""

from mode_gguf.allocation.budget import Budget
from mode_gguf.artifacts import Record


class GranularityRow(Record):
    """A plan: bytes of its units, what the solver predicts, and what unpacked weights were measured to do.

    `kl` is in nats per scored position of text and of image answers.
    """

    granularity: str
    size_bytes: int
    predicted: float
    kl: tuple[float, ...]


class GranularityReport(Record):
    """Both plans under one budget; sizes are without routers, norms and biases."""

    budget: Budget
    preset: str
    rows: list[GranularityRow]

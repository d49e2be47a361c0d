"""Output of a GPU memory breakdown, as a table and as JSON."""

from typing import TYPE_CHECKING, Any

from mode_gguf_cli.console import show

if TYPE_CHECKING:
    from mode_gguf.gpu_memory.breakdown import MemoryBreakdown


def show_memory(breakdown: "MemoryBreakdown | None") -> None:
    """Print a line per item of the breakdown, and the free rest; nothing where memory is not the budget."""
    if breakdown is None:
        return
    show(f"memory     {_mib(breakdown.memory)} MiB of the GPU, {breakdown.settings}")
    for line in breakdown.lines:
        if line.on_gpu:
            show(f"           {_mib(line.bytes)}  {line.name}: {line.what}")
    show(f"           {_mib(breakdown.memory - breakdown.used)}  free")
    for line in breakdown.lines:
        if not line.on_gpu:
            show(f"           ({_mib(line.bytes).strip()} MiB  {line.name}: {line.what})")


def memory_json(breakdown: "MemoryBreakdown | None") -> dict[str, Any] | None:
    """The breakdown as in plan.json, with its sums."""
    if breakdown is None:
        return None
    return {**breakdown.model_dump(mode="json"), "used": breakdown.used, "free": breakdown.memory - breakdown.used}


def _mib(size: int) -> str:
    return f"{size / 2**20:10,.1f}"

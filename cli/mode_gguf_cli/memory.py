"""Output of a GPU memory breakdown, as a table and as JSON."""

from typing import TYPE_CHECKING, Any

from mode_gguf_cli.console import show

if TYPE_CHECKING:
    from mode_gguf.gpu_memory.breakdown import MemoryBreakdown


def show_memory(ledger: "MemoryBreakdown | None") -> None:
    """Print a line per item of the breakdown, and the free rest; nothing where memory is not the budget."""
    if ledger is None:
        return
    show(f"memory     {_mib(ledger.memory)} MiB of the GPU, {ledger.settings}")
    for line in ledger.lines:
        if line.on_gpu:
            show(f"           {_mib(line.bytes)}  {line.name}: {line.what}")
    show(f"           {_mib(ledger.memory - ledger.used)}  free")
    for line in ledger.lines:
        if not line.on_gpu:
            show(f"           ({_mib(line.bytes).strip()} MiB  {line.name}: {line.what})")


def memory_json(ledger: "MemoryBreakdown | None") -> dict[str, Any] | None:
    """The breakdown as in plan.json, with its sums."""
    if ledger is None:
        return None
    return {**ledger.model_dump(mode="json"), "used": ledger.used, "free": ledger.memory - ledger.used}


def _mib(size: int) -> str:
    return f"{size / 2**20:10,.1f}"

"""Layerwise execution of many forwards: one decoder layer at a time.

Every sample runs the model's own forward in a greenlet of its own. A hook before each decoder layer suspends it; the
driver loads the layer, resumes one after the other until it reaches the next layer, and frees the layer again. Masks,
rotary positions, DeepStack and whatever else a model does between its layers stay the model's own code, and a layer's
weights are read once for all samples.

Threads would do, but math libraries keep buffers for every thread that computes, 25 MB each, and OpenMP a team of
workers: with hundreds of samples that is more than what the samples themselves need.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from mode_gguf.forward.distributed import raise_on_all_ranks
from mode_gguf.forward.offload import TensorOffload
from mode_gguf.progress import Progress, silent


class _SampleForward:
    """One sample's forward; it runs only while the driver waits inside `advance`."""

    def __init__(self, forward: Callable[[], None]) -> None:
        self.waiting_for = -1
        self._driver, self._greenlet = getcurrent(), greenlet(forward)
        self._records_gradients = True

    @property
    def finished(self) -> bool:
        return bool(self._greenlet.dead)

    def advance(self) -> None:
        """Run up to the next layer or the end; raises what the forward raised. Each has its own gradient mode."""
        driver_mode = torch.is_grad_enabled()
        torch.set_grad_enabled(self._records_gradients)
        try:
            self._greenlet.switch()
        finally:
            self._records_gradients = torch.is_grad_enabled()
            torch.set_grad_enabled(driver_mode)

    def suspend_before(self, layer: int) -> None:
        """Called inside the forward: return once the driver has loaded `layer`."""
        self.waiting_for = layer
        self._driver.switch()

    def cancel(self) -> None:
        """Unwind the forward; does nothing when it has ended."""
        if not self.finished:
            driver_mode = torch.is_grad_enabled()
            self._greenlet.throw(GreenletExit)
            torch.set_grad_enabled(driver_mode)


def no_callback(*numbers: int) -> None:
    """The default callback, which does nothing."""


@dataclass(frozen=True, slots=True)
class LayerCallbacks:
    """Callbacks around the decoder layers.

    Attributes:
        load: load(i) makes layer i's weights resident, before any sample enters it.
        free: free(i) after all samples have left it.
        enter: enter(n) before sample n runs on.
        leave: leave(n, i) after sample n has left layer i; for the last layer, after its forward has returned.
    """

    load: Callable[[int], None]
    free: Callable[[int], None]
    enter: Callable[[int], None] = no_callback
    leave: Callable[[int, int], None] = no_callback


def run_layerwise(
    layers: Sequence[nn.Module],
    forwards: Sequence[Callable[[], None]],
    callbacks: LayerCallbacks,
    *,
    offload: TensorOffload | None = None,
    tokens: Sequence[int] | None = None,
    description: str,
    progress: Progress = silent,
) -> None:
    """Run all `forwards`, loading every layer once.

    Args:
        layers: the decoder layers, in the order in which each forward passes all of them.
        forwards: one callable per sample; each begins with gradients on.
        callbacks: called around the layers.
        offload: of suspended forwards' tensors; None leaves them where they are.
        tokens: of each forward, for `progress`, which counts them layer by layer; None for one each.
        description: of the work, for `progress`.

    Raises:
        BaseException: what a forward, a callback or Ctrl-C raised, here or in another process that takes part; every
            forward has ended by then.
    """
    samples = [_SampleForward(forward) for forward in forwards]
    running: list[int] = []

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        last = index == len(layers) - 1

        def suspend(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            number = running[0]
            with offload.offloaded(number, index, arguments[0], last=last) if offload else nullcontext():
                samples[number].suspend_before(index)

        return suspend

    def advance(number: int, reached: int) -> None:
        sample = samples[number]
        running[:] = [number]
        callbacks.enter(number)
        sample.advance()
        if sample.waiting_for != min(reached, len(layers) - 1) or sample.finished != (reached == len(layers)):
            raise RuntimeError(f"sample {number} did not pass the decoder layers in order (layer {reached} expected)")

    with ExitStack() as stack:
        for sample in samples:
            stack.callback(sample.cancel)
        for index, layer in enumerate(layers):
            stack.enter_context(layer.register_forward_pre_hook(hook(index)))
        with offload.tracking() if offload else nullcontext():
            for number in range(len(samples)):
                advance(number, reached=0)
        amounts = tokens or [1] * len(samples)
        unit = "tokens" if tokens else "samples"
        with progress.step(description, sum(amounts) * len(layers), unit, len(layers)) as done:
            for index in range(len(layers)):
                callbacks.load(index)
                for number in range(len(samples)):
                    advance(number, reached=index + 1)
                    callbacks.leave(number, index)
                    done(amounts[number])
                callbacks.free(index)
                raise_on_all_ranks()  # an error in another process should not show hours later

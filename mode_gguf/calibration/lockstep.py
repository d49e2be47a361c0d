"""Many forwards side by side, one decoder layer at a time.

Every sample runs the model's own forward in a thread of its own. A hook before each decoder layer puts the thread to
sleep; the driver loads the layer, wakes one thread after the other until it reaches the next layer, and frees the layer
again. Masks, rotary positions, DeepStack and whatever else a model does between its layers stay the model's own code,
and a layer's weights are read once for all samples. Threads never run at the same time, so nothing needs a lock and the
order of all sums is fixed.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import Tensor, nn

from mode_gguf.calibration.distributed import agree
from mode_gguf.calibration.parking import Parking
from mode_gguf.progress import Progress, silent


class _Cancelled(BaseException):
    """Unwinds a sleeping thread; a BaseException so that no model code catches it."""


class _Lane:
    """One sample's forward. Its thread runs only while the driver waits inside `advance`."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.waiting_for = -1
        self.finished = False
        self._work = work
        self._error: BaseException | None = None
        self._cancelled = False
        self._wake = threading.Semaphore(0)
        self._asleep = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def advance(self) -> None:
        """Run up to the next layer or the end; raises what the forward raised."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._wake.release()
        self._asleep.acquire()
        if self._error is not None:
            raise self._error

    def sleep_before(self, layer: int) -> None:
        """Called in the lane's thread: return once the driver has loaded `layer`."""
        self.waiting_for = layer
        self._asleep.release()
        self._wake.acquire()
        if self._cancelled:
            raise _Cancelled

    def cancel(self) -> None:
        """Unwind the thread and wait until it is gone; does nothing when it has ended."""
        if self._thread.ident is not None:
            self._cancelled = True
            self._wake.release()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        self.finished = True
        self._asleep.release()


def run_in_lockstep(
    layers: Sequence[nn.Module],
    forwards: Sequence[Callable[[], None]],
    *,
    load: Callable[[int], None],
    free: Callable[[int], None],
    enter: Callable[[int], None],
    leave: Callable[[int, int], None],
    parking: Parking | None = None,
    tokens: Sequence[int] | None = None,
    description: str,
    progress: Progress = silent,
) -> None:
    """Run all `forwards`, loading every layer once.

    Args:
        layers: the decoder layers, in the order in which each forward passes all of them.
        forwards: one callable per sample; each runs in its own thread (gradient mode must be set inside).
        load: load(i) makes layer i's weights resident, before any sample enters it.
        free: free(i) after all samples have left it.
        enter: enter(n) before sample n runs on.
        leave: leave(n, i) after sample n has left layer i; for the last layer, after its forward has returned.
        parking: where the tensors of those that sleep go; None leaves them where they are.
        tokens: of each forward, for `progress`, which counts them layer by layer; None for one each.
        description: of the work, for `progress`.

    Raises:
        BaseException: what a forward, a callback or Ctrl-C raised, here or in another process that takes part; every
            thread has ended by then.
    """
    lanes = [_Lane(forward) for forward in forwards]
    running: list[int] = []

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        last = index == len(layers) - 1

        def sleep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            number = running[0]
            with parking.parked(number, index, arguments[0], last=last) if parking else nullcontext():
                lanes[number].sleep_before(index)

        return sleep

    def advance(number: int, reached: int) -> None:
        lane = lanes[number]
        running[:] = [number]
        enter(number)
        lane.advance()
        if lane.waiting_for != min(reached, len(layers) - 1) or lane.finished != (reached == len(layers)):
            raise RuntimeError(f"sample {number} did not pass the decoder layers in order (layer {reached} expected)")

    hooks = [layer.register_forward_pre_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        with parking.noticing() if parking else nullcontext():
            for number in range(len(lanes)):
                advance(number, reached=0)
        amounts = tokens or [1] * len(lanes)
        unit = "tokens" if tokens else "samples"
        with progress.step(description, sum(amounts) * len(layers), unit, len(layers)) as done:
            for index in range(len(layers)):
                load(index)
                for number in range(len(lanes)):
                    advance(number, reached=index + 1)
                    leave(number, index)
                    done(amounts[number])
                free(index)
                agree()  # an error in another process should not show hours later
    finally:
        for handle in hooks:
            handle.remove()
        for lane in lanes:
            lane.cancel()

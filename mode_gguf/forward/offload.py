"""Offloading of suspended forwards' tensors to a `HiddenStore`.

A forward that waits for its next layer holds that layer's input, what the text model was called with (embeddings,
DeepStack features), and what the modules beside the text model computed for it (image embeddings). With many samples
that takes more memory than a layer's weights. Their storages are emptied while the forward is suspended and filled
again before it reads them: the frames of a Python call hold its tensors, so that they cannot be freed in any other way.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mode_gguf.forward.hidden_store import HiddenStore

_MIN_BYTES = 1 << 12
"""Size in bytes below which tensors stay where they are."""

_DEVICE_SHARE = 0.25
"""Share of a GPU's memory, free when the first tensor comes, for tensors of suspended forwards that may stay there."""


@dataclass(frozen=True, slots=True)
class _Offloaded:
    """A tensor of a suspended forward; `emptied` unless it stays on its GPU or shares its memory with the store's."""

    key: Hashable
    tensor: Tensor
    emptied: bool
    on_device: int = 0


@dataclass(slots=True)
class _SampleTensors:
    """Tensors that one forward holds besides its layer's input: those of outside the text model, and inside it."""

    outside: list[Tensor] = field(default_factory=list)
    inside: list[Tensor] = field(default_factory=list)
    offloaded_outside: list[_Offloaded] = field(default_factory=list)


_SAMPLE: ContextVar[_SampleTensors] = ContextVar("sample_tensors")
"""Tensors of the running forward: every greenlet has a context of its own."""


class TensorOffload:
    """Offload of the tensors of one suspended forward after the other.

    On the CPU, what the store holds in memory is the forward's own tensor, so nothing moves before the store's limit is
    reached. On a GPU a quarter of its free memory is used before the store is.

    Args:
        store: for offloaded tensors.
        model: the module that the forwards run.
        text_model: name of the submodule with the decoder layers.
        keep: whether the store keeps the inputs of all layers, under (sample, layer), when forwards go on.
    """

    def __init__(self, store: HiddenStore, model: nn.Module, text_model: str, *, keep: bool = False) -> None:
        self._store = store
        self._model, self._text_model = model, text_model
        self._keep = keep
        self._device_budget: int | None = None

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Track the tensors of forwards that begin while the context lasts."""
        parent, _, name = self._text_model.rpartition(".")
        siblings = [module for child, module in self._model.get_submodule(parent).named_children() if child != name]
        text_model = self._model.get_submodule(self._text_model)

        def begin(module: nn.Module, arguments: object) -> None:
            _SAMPLE.set(_SampleTensors())

        def keep_output(module: nn.Module, arguments: object, output: object) -> None:
            self._current.outside.extend(_tensors(output))

        def keep_arguments(module: nn.Module, arguments: object, options: Mapping[str, object]) -> None:
            self._current.inside.extend(_tensors(options))

        with ExitStack() as hooks:
            hooks.enter_context(self._model.register_forward_pre_hook(begin))
            hooks.enter_context(text_model.register_forward_pre_hook(keep_arguments, with_kwargs=True))
            for module in siblings:
                hooks.enter_context(module.register_forward_hook(keep_output))
            yield

    @contextmanager
    def offloaded(self, number: int, layer: int, hidden: Tensor, *, last: bool) -> Iterator[None]:
        """Context in which forward `number` is suspended before `layer`, entered by the forward itself.

        Args:
            hidden: the layer's input; nobody may write to it.
            last: whether this is the last layer, after which the forward may read any tensor it holds.
        """
        held = self._current
        if layer == 0:
            outside = _distinct(held.outside, but=[hidden, *held.inside])
            held.offloaded_outside = [self._offload((number, "outside", index), tensor) for index, tensor in outside]
        inside = _distinct(held.inside, but=[hidden])
        offloaded = [self._offload((number, "inside", index), tensor) for index, tensor in inside]
        layer_input = self._offload((number, layer), hidden, must_keep=self._keep)
        yield  # a forward that is cancelled needs none of them again
        self._restore(layer_input, forget=not self._keep)
        for one in offloaded:
            self._restore(one, forget=last)
        if last:
            for one in held.offloaded_outside:
                self._restore(one, forget=True)

    @property
    def _current(self) -> _SampleTensors:
        """Tensors of the running forward."""
        return _SAMPLE.get(None) or _SampleTensors()

    def _offload(self, key: Hashable, tensor: Tensor, *, must_keep: bool = False) -> _Offloaded:
        if tensor.is_cuda and not must_keep and key not in self._store and self._reserve_on_device(tensor):
            return _Offloaded(key, tensor, emptied=False, on_device=tensor.nbytes)
        if key not in self._store:
            self._store.put(key, tensor)
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
        emptied = whole and self._store.get(key).data_ptr() != tensor.data_ptr()
        if emptied:
            storage.resize_(0)
        return _Offloaded(key, tensor, emptied)

    def _restore(self, offloaded: _Offloaded, *, forget: bool) -> None:
        if offloaded.on_device and self._device_budget is not None:
            self._device_budget += offloaded.on_device
        if offloaded.emptied:
            offloaded.tensor.untyped_storage().resize_(offloaded.tensor.nbytes)
            offloaded.tensor.copy_(self._store.get(offloaded.key))
        if forget:
            self._store.drop(offloaded.key)

    def _reserve_on_device(self, tensor: Tensor) -> bool:
        """Reserve GPU memory for a tensor; False where the budget is used up."""
        if self._device_budget is None:
            self._device_budget = int(_DEVICE_SHARE * torch.cuda.mem_get_info(tensor.device)[0])
        if tensor.nbytes > self._device_budget:
            return False
        self._device_budget -= tensor.nbytes
        return True


def _tensors(value: object) -> Iterator[Tensor]:
    """Tensors of at least `_MIN_BYTES` in nested arguments or outputs."""
    if isinstance(value, Tensor):
        if value.nbytes >= _MIN_BYTES:
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)


def _distinct(tensors: Iterable[Tensor], *, but: Iterable[Tensor]) -> list[tuple[int, Tensor]]:
    """Tensors with a memory of their own, with their index in the list; none that shares it with `but`."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in but}
    found = []
    for index, tensor in enumerate(tensors):
        address = tensor.untyped_storage().data_ptr()
        if address not in seen:
            seen.add(address)
            found.append((index, tensor))
    return found

"""A GGUF model and its projector inside this process: full-vocabulary logits, which no llama.cpp tool or server gives.

One sequence at a time; the KV cache is cleared before every prompt, so calls do not depend on each other.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
from PIL import Image

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.gguf.header import read_header
from mode_gguf.image_files import open_image_file
from mode_gguf.llama_cpp import c_api
from mode_gguf.llama_cpp.chat_template import ChatTemplate
from mode_gguf.llama_cpp.engines import Engine, engine_for
from mode_gguf.llama_cpp.gpu_offload import ON_CPU, Offload, apply_to_model
from mode_gguf.llama_cpp.model_protocol import ImageInput, Logits

SCORED_BLOCK: Final = 128
"""Positions whose logits llama.cpp holds at once: 78 MB of a vocabulary of 152 k."""
BATCH: Final = 512
BATCH_NON_CAUSAL: Final = 2048
"""Projectors whose image tokens see each other (Gemma's) need a whole image in one batch."""


class LlamaModel:
    """A text model, and its projector if there is one, in llama.cpp; a context manager that frees both.

    Args:
        text_gguf: the language model; of a split file, the first shard.
        mmproj: the projector, for prompts with an image.
        context: tokens a prompt and its answer may take together.
        threads: CPU threads; by default the cores this process may run on.
        offload: what is computed where; without a GPU build it changes nothing.
        exact: KV cache in F32, no flash attention, no repacked weights: for comparisons with other implementations.
            Otherwise llama.cpp's defaults, which is what users run.
        engine: the llama.cpp that runs it; by default the one that `text_gguf` needs.

    Raises:
        InputError: a file is missing or is not GGUF.
        UsageError: `offload` names a buffer or device that there is not.
        MissingResourceError: no usable llama.cpp, or `text_gguf` has one type per expert and our own build is missing.
        ValidationError: llama.cpp refuses a file; the message says which and llama.cpp's reason.
    """

    def __init__(
        self,
        text_gguf: Path,
        mmproj: Path | None = None,
        *,
        context: int = 4096,
        threads: int | None = None,
        offload: Offload = ON_CPU,
        exact: bool = False,
        engine: Engine | None = None,
    ) -> None:
        self.text_gguf = text_gguf
        self.mmproj = mmproj
        for path in filter(None, (text_gguf, mmproj)):
            read_header(path)
        self._lib = (engine or engine_for(text_gguf)).library()
        self._model = self._context = self._mtmd = None
        self._kept: list[object] = []  # what llama.cpp points to
        threads = threads or _usable_cores()
        try:
            self._model = self._load_model(offload, exact)
            if mmproj is not None:
                self._mtmd = self._load_projector(mmproj, threads, offload, exact)
            self._context = self._new_context(context, threads, offload, exact)
        except BaseException:
            self.close()
            raise
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> "LlamaModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The file's path, for messages."""
        return str(self.text_gguf)

    def close(self) -> None:
        """Free everything; safe to call again."""
        for handle, free in (
            ("_context", self._lib.llama_free),
            ("_mtmd", self._lib.mtmd_free),
            ("_model", self._lib.llama_model_free),
        ):
            if getattr(self, handle):
                free(getattr(self, handle))
                setattr(self, handle, None)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, nothing added around it; `special` reads `<|im_start|>` and its like as one token."""
        data = text.encode()
        capacity = len(data) + 8
        tokens = (ctypes.c_int32 * capacity)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, capacity, False, special)
        return list(tokens[:count])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special ones; bytes that are not UTF-8 become U+FFFD."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        capacity = 16 * len(tokens) + 64
        buffer = ctypes.create_string_buffer(capacity)
        count = self._lib.llama_detokenize(self._vocab, array, len(tokens), buffer, capacity, True, False)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._lib.llama_detokenize(self._vocab, array, len(tokens), buffer, -count, True, False)
        return buffer.raw[:count].decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether generation stops at `token`."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    @property
    def beginning(self) -> list[int]:
        """The token that every sequence begins with, if the family has one."""
        if not self._lib.llama_vocab_get_add_bos(self._vocab):
            return []
        return [self._lib.llama_vocab_bos(self._vocab)]

    @property
    def end_of_turn(self) -> list[int]:
        """The token that ends an answer in the model's chat template; empty where it ends them with plain text.

        Not the vocabulary's `eot`: llama.cpp guesses that one from names.
        """
        return [token for token in self.tokenize(self.chat_template.after_answer())[:1] if self.is_end(token)]

    @property
    def chat_template(self) -> ChatTemplate:
        """The template stored in the GGUF file.

        Raises:
            InputError: the file has none, or Jinja cannot read it.
        """
        source = self._lib.llama_model_chat_template(self._model, None)
        if source is None:
            raise InputError(f"{self.text_gguf}: no chat template is stored, so questions cannot be asked")
        try:
            text: str = source.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.text_gguf}: the stored chat template is not UTF-8 ({error})") from error
        return ChatTemplate(
            source=text,
            bos=self._token_text(self._lib.llama_vocab_bos(self._vocab)),
            eos=self._token_text(self._lib.llama_vocab_eos(self._vocab)),
            origin=str(self.text_gguf),
        )

    @property
    def image_marker(self) -> str:
        """The marker that stands for the image in a prompt."""
        marker: bytes = self._lib.mtmd_default_marker()
        return marker.decode()

    def text_logits(self, tokens: Sequence[int]) -> Logits:
        """Logits after every token of `tokens`: row i predicts token i + 1."""
        self._clear()
        return np.concatenate(list(self._decode(tokens, position=0, first_scored=0)))

    def continuation_logits(self, tokens: Sequence[int]) -> Logits:
        """Logits that predict each of tokens[1:]."""
        return self.text_logits(tokens[:-1])

    def logits(self, prompt: str, answer: Sequence[int], image: ImageInput | None = None) -> Logits:
        """Logits of the positions that predict each token of `answer`, when `answer` itself is fed (teacher forcing).

        Args:
            prompt: text with special tokens; holds `image_marker` once if there is an image.
            answer: token ids, at least one.

        Raises:
            InputError: the image cannot be read, or prompt and answer exceed the context.
            ValidationError: llama.cpp fails at it.
        """
        first, position = self._prompt(prompt, image, reserved=len(answer))
        rest = self._decode(answer[:-1], position=position, first_scored=0)
        return np.concatenate([first, *rest])

    def predictions(
        self, tokens: Sequence[int], count: int, image: ImageInput | None = None, place: tuple[int, int] = (0, 0)
    ) -> Logits:
        """Logits behind each of the last `count` of `tokens`, which are fed as they are.

        Args:
            image: is fed in the place of tokens[place[0]:place[1]], without the marks that a prompt would have around
                it: those are among the tokens.

        Raises:
            InputError: tokens exceed the context, or `image` cannot be read.
            ValidationError: llama.cpp fails at it.
        """
        self._check_context(len(tokens))
        self._clear()
        position, rest = 0, tokens
        if image is not None:
            position = self._decode_image(tokens[: place[0]], image)
            rest = tokens[place[1] :]
        return np.concatenate(list(self._decode(rest, position=position, first_scored=len(rest) - count)))

    def image_tokens(self, image: ImageInput) -> int:
        """Tokens that an image takes, those between its parts included, marks around it not; raises as `logits`."""
        with self._image_chunks(image) as chunks:
            return sum(self._lib.mtmd_input_chunk_get_n_tokens(chunk) for chunk in chunks)

    def generate(self, prompt: str, image: ImageInput | None = None, *, max_tokens: int = 128) -> list[int]:
        """The greedy answer to `prompt`: token ids, the one that ends it included; raises as `logits` does."""
        rows, position = self._prompt(prompt, image, reserved=max_tokens)
        answer = [int(rows[-1].argmax())]
        while len(answer) < max_tokens and not self.is_end(answer[-1]):
            rows = next(self._decode(answer[-1:], position=position, first_scored=0))
            position += 1
            answer.append(int(rows[-1].argmax()))
        return answer

    def _load_model(self, offload: Offload, exact: bool) -> int:
        params = self._lib.llama_model_default_params()
        self._kept = apply_to_model(offload, params, self._lib)
        params.use_extra_bufts = not exact
        model: int | None = self._lib.llama_model_load_from_file(os.fsencode(self.text_gguf), params)
        if model is None:
            raise ValidationError(f"{self.text_gguf}: llama.cpp cannot load it: {c_api.last_errors()}")
        return model

    def _load_projector(self, mmproj: Path, threads: int, offload: Offload, exact: bool) -> int:
        params = self._lib.mtmd_context_params_default()
        params.use_gpu = offload.projector and offload.n_gpu_layers != 0
        params.print_timings = False
        params.warmup = False
        params.n_threads = threads
        params.flash_attn_type = c_api.FLASH_ATTENTION_OFF if exact else c_api.FLASH_ATTENTION_AUTO
        mtmd: int | None = self._lib.mtmd_init_from_file(os.fsencode(mmproj), self._model, params)
        if mtmd is None:
            raise ValidationError(
                f"{mmproj}: llama.cpp cannot load it as the projector of {self.text_gguf}: {c_api.last_errors()}"
            )
        if not self._lib.mtmd_support_vision(mtmd):
            self._mtmd = mtmd
            raise InputError(f"{mmproj}: holds no vision encoder; give the model's mmproj file")
        return mtmd

    def _new_context(self, context: int, threads: int, offload: Offload, exact: bool) -> int:
        whole_images = self._mtmd and self._lib.mtmd_decode_use_non_causal(self._mtmd, None)
        self._n_batch = min(BATCH_NON_CAUSAL if whole_images else BATCH, context)
        params = self._lib.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = self._n_batch
        params.n_outputs_max = params.n_outputs_max_per_seq = min(SCORED_BLOCK, self._n_batch)
        params.n_threads = params.n_threads_batch = threads
        params.offload_kqv = offload.kv_cache
        if exact:
            params.flash_attn_type = c_api.FLASH_ATTENTION_OFF
            params.type_k = params.type_v = c_api.GGML_TYPE_F32
        handle: int | None = self._lib.llama_init_from_model(self._model, params)
        if handle is None:
            raise ValidationError(
                f"{self.text_gguf}: llama.cpp cannot make a context of {context} tokens: {c_api.last_errors()}"
            )
        return handle

    def _token_text(self, token: int) -> str:
        return self._lib.llama_vocab_get_text(self._vocab, token).decode() if token >= 0 else ""

    def _lacks_beginning(self, prompt: str) -> bool:
        """Whether `prompt` lacks the beginning token, which chat templates write and plain prompts do not."""
        return any(not prompt.startswith(self._token_text(token)) for token in self.beginning)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _prompt(self, prompt: str, image: ImageInput | None, reserved: int) -> tuple[Logits, int]:
        """Feed a prompt; the logits of its last token, (1, vocabulary), and the position that follows it."""
        self._clear()
        if image is None:
            tokens = self.tokenize(prompt)
            if self._lacks_beginning(prompt):
                tokens = self.beginning + tokens
            self._check_context(len(tokens) + reserved)
            *_, last = self._decode(tokens, position=0, first_scored=len(tokens) - 1)
            return last, len(tokens)
        if self._mtmd is None:
            raise InputError(f"{self.text_gguf}: an image needs the model's projector, and no mmproj file was given")
        with self._chunks(prompt, image) as chunks:
            self._check_context(self._lib.mtmd_helper_get_n_tokens(chunks) + reserved)
            position = ctypes.c_int32(0)
            status = self._lib.mtmd_helper_eval_chunks(
                self._mtmd, self._context, chunks, 0, 0, self._n_batch, True, ctypes.byref(position)
            )
        if status != 0:
            raise ValidationError(f"{self.text_gguf}: llama.cpp fails at an image prompt: {c_api.last_errors()}")
        row = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, (1, self.n_vocab)).copy(), position.value

    @contextmanager
    def _chunks(self, prompt: str, image: ImageInput) -> Iterator[int]:
        """`prompt` cut into chunks of text and image by mtmd, which adds the family's begin and end tokens."""
        if prompt.count(self.image_marker) != 1:
            raise InputError(f"the prompt must hold {self.image_marker} exactly once, the place of its image")
        opened = open_image(image)
        bitmap = self._lib.mtmd_bitmap_init(*opened.size, opened.tobytes())
        chunks = self._lib.mtmd_input_chunks_init()
        try:
            data = prompt.encode()
            text = c_api.InputText(data, len(data), self._lacks_beginning(prompt), True)
            bitmaps = (ctypes.c_void_p * 1)(bitmap)
            status = self._lib.mtmd_tokenize(self._mtmd, chunks, ctypes.byref(text), bitmaps, 1)
            if status != 0:
                raise ValidationError(
                    f"{self.mmproj}: llama.cpp cannot prepare an image of {opened.width} x {opened.height} pixels: "
                    f"{c_api.last_errors()}"
                )
            yield chunks
        finally:
            self._lib.mtmd_input_chunks_free(chunks)
            self._lib.mtmd_bitmap_free(bitmap)

    @contextmanager
    def _image_chunks(self, image: ImageInput) -> Iterator[list[int]]:
        """The chunks of an image alone, from its first part to its last."""
        if self._mtmd is None:
            raise InputError(f"{self.text_gguf}: an image needs the model's projector, and no mmproj file was given")
        with self._chunks(self.image_marker, image) as chunks:
            all_chunks = [
                self._lib.mtmd_input_chunks_get(chunks, index)
                for index in range(self._lib.mtmd_input_chunks_size(chunks))
            ]
            parts = [
                index
                for index, chunk in enumerate(all_chunks)
                if self._lib.mtmd_input_chunk_get_type(chunk) == c_api.IMAGE_CHUNK
            ]
            yield all_chunks[parts[0] : parts[-1] + 1]

    def _decode_image(self, before: Sequence[int], image: ImageInput) -> int:
        """Feed `before` and an image behind it; the position that follows."""
        for _ in self._decode(before, position=0, first_scored=len(before)):
            pass
        position = ctypes.c_int32(len(before))
        with self._image_chunks(image) as chunks:
            for chunk in chunks:
                status = self._lib.mtmd_helper_eval_chunk_single(
                    self._mtmd, self._context, chunk, position, 0, self._n_batch, False, ctypes.byref(position)
                )
                if status != 0:
                    raise ValidationError(f"{self.text_gguf}: llama.cpp fails at an image: {c_api.last_errors()}")
        return position.value

    def _check_context(self, tokens: int) -> None:
        size = self._lib.llama_n_ctx(self._context)
        if tokens > size:
            raise InputError(
                f"a prompt and its answer take {tokens} tokens and the context holds {size}: "
                "use a larger context or a smaller image"
            )

    def _decode(self, tokens: Sequence[int], *, position: int, first_scored: int) -> Iterator[Logits]:
        """Feed text tokens from `position` on; yield the logits after tokens[first_scored:], block by block."""
        self._check_context(len(tokens))
        start = 0
        while start < len(tokens):
            scored = start >= first_scored
            stop = min(len(tokens), start + (SCORED_BLOCK if scored else self._n_batch))
            if not scored:
                stop = min(stop, first_scored)
            rows = self._decode_block(tokens[start:stop], position + start, scored)
            if scored:
                yield rows
            start = stop

    def _decode_block(self, tokens: Sequence[int], position: int, scored: bool) -> Logits:
        count = len(tokens)
        batch = c_api.Batch(
            n_tokens=count,
            token=(ctypes.c_int32 * count)(*tokens),
            pos=(ctypes.c_int32 * count)(*range(position, position + count)),
            logits=(ctypes.c_int8 * count)(*[scored] * count),
        )
        if self._lib.llama_decode(self._context, batch) != 0:
            raise ValidationError(f"{self.text_gguf}: llama.cpp fails at {count} tokens: {c_api.last_errors()}")
        if not scored:
            return np.empty((0, self.n_vocab), np.float32)
        rows = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, (count, self.n_vocab)).copy()


def open_image(image: ImageInput) -> Image.Image:
    """`image` in RGB.

    Raises:
        InputError: it cannot be read.
    """
    return open_image_file(image, f"image of {len(image)} bytes" if isinstance(image, bytes) else str(image))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

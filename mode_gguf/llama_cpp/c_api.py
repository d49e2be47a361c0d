"""llama.cpp's C API, declared for ctypes: of the shared object in the `xllamacpp` package, and of other builds.

Declared here is only what `llama_cpp.py` calls. Structures are written field by field as in `llama.h` and `mtmd.h` of
build `OLDEST_BUILD`, and of the release that `mode-gguf runtime build` builds, where they differ; parameters travel by
value, so a field too many or too few would corrupt memory silently. Hence the check before first use: the library's own
default parameters, read through these declarations, must come out as documented, field by field. `reserve` at their
ends is room for fields that a newer build may append. A build in a folder may be either of the two or newer, and is
read as the one whose defaults come out right.

Both libraries may be loaded in one process; neither sees the other's symbols (RTLD_LOCAL, the default of ctypes).
"""

import ctypes
import importlib.metadata
import logging
import sys
from collections import deque
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

from mode_gguf.errors import MissingResourceError
from mode_gguf.llama_cpp.runtime.pinned_release import B11434
from mode_gguf.llama_cpp_library import embedded_library
from mode_gguf.quantization.libggml import load_library

OLDEST_BUILD: Final = 11549
"""First llama.cpp build whose structures read as declared here; newer ones are accepted if their defaults agree."""

GGML_TYPE_F32: Final = 0
GGML_TYPE_F16: Final = 1
FLASH_ATTENTION_AUTO: Final = -1
FLASH_ATTENTION_OFF: Final = 0
IMAGE_CHUNK: Final = 1
"""`MTMD_INPUT_CHUNK_TYPE_IMAGE`."""
SPLIT_MODES: Final = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
"""`enum llama_split_mode`."""

logger = logging.getLogger("mode_gguf.libllama")

_WAY_OUT = f"install a matching one with: pip install 'xllamacpp>=2026.10.{OLDEST_BUILD}'"


def _fields_and_defaults(*rows: tuple[Any, ...]) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """`_fields_` of a structure, and its documented defaults, from rows (name, type) or (name, type, default)."""
    return [(name, kind) for name, kind, *_ in rows], {row[0]: row[2] for row in rows if len(row) > 2}


class ModelParams(Structure):
    """`struct llama_model_params`."""

    _fields_, defaults = _fields_and_defaults(
        ("devices", c_void_p, None),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32, -1),
        ("split_mode", c_int, 1),
        ("load_mode", c_int, -1),
        ("lazy_mode", c_int, 1),
        ("main_gpu", c_int32, 0),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p, None),
        ("vocab_only", c_bool, False),
        ("check_tensors", c_bool, False),
        ("use_extra_bufts", c_bool, True),
        ("no_host", c_bool, False),
        ("no_alloc", c_bool, False),
        ("load_mtp", c_bool, False),
        ("reserve", c_void_p * 16),
    )


class BufferOverride(Structure):
    """`struct llama_model_tensor_buft_override`; an array of them ends with a null pattern."""

    _fields_: ClassVar = [("pattern", c_char_p), ("buffer_type", c_void_p)]


class ContextParams(Structure):
    """`struct llama_context_params`."""

    _fields_, defaults = _fields_and_defaults(
        ("n_ctx", c_uint32, 512),
        ("n_batch", c_uint32, 2048),
        ("n_ubatch", c_uint32, 512),
        ("n_seq_max", c_uint32, 1),
        ("n_rs_seq", c_uint32, 0),
        ("n_outputs_max", c_uint32, 0),
        ("n_outputs_max_per_seq", c_uint32, 1),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int, 0),
        ("rope_scaling_type", c_int, -1),
        ("pooling_type", c_int, -1),
        ("attention_type", c_int, -1),
        ("flash_attn_type", c_int, FLASH_ATTENTION_AUTO),
        ("rope_freq_base", c_float, 0.0),
        ("rope_freq_scale", c_float, 0.0),
        ("yarn_ext_factor", c_float, -1.0),
        ("yarn_attn_factor", c_float, -1.0),
        ("yarn_beta_fast", c_float, -1.0),
        ("yarn_beta_slow", c_float, -1.0),
        ("yarn_orig_ctx", c_uint32, 0),
        ("defrag_thold", c_float, -1.0),
        ("cb_eval", c_void_p, None),
        ("cb_eval_user_data", c_void_p, None),
        ("type_k", c_int, GGML_TYPE_F16),
        ("type_v", c_int, GGML_TYPE_F16),
        ("moe_cache_size", c_size_t, 0),
        ("abort_callback", c_void_p, None),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool, False),
        ("offload_kqv", c_bool, True),
        ("no_perf", c_bool, True),
        ("op_offload", c_bool, True),
        ("swa_full", c_bool, True),
        ("kv_unified", c_bool, False),
        ("samplers", c_void_p, None),
        ("n_samplers", c_size_t, 0),
        ("ctx_other", c_void_p, None),
        ("reserve", c_void_p * 16),
    )


class MtmdParams(Structure):
    """`struct mtmd_context_params`."""

    _fields_, defaults = _fields_and_defaults(
        ("use_gpu", c_bool, True),
        ("device", c_void_p, None),
        ("print_timings", c_bool, True),
        ("n_threads", c_int, 4),
        ("image_marker", c_char_p, None),
        ("media_marker", c_char_p),
        ("flash_attn_type", c_int, FLASH_ATTENTION_AUTO),
        ("warmup", c_bool, True),
        ("image_min_tokens", c_int, -1),
        ("image_max_tokens", c_int, -1),
        ("cb_eval", c_void_p, None),
        ("cb_eval_user_data", c_void_p),
        ("batch_max_tokens", c_int32, 1024),
        ("progress_callback", c_void_p, None),
        ("progress_callback_user_data", c_void_p),
        ("reserve", c_void_p * 16),
    )


class Batch(Structure):
    """`struct llama_batch`; null `n_seq_id` and `seq_id` mean sequence 0."""

    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


class InputText(Structure):
    """`struct mtmd_input_text`."""

    _fields_: ClassVar = [
        ("text", c_char_p),
        ("text_len", c_size_t),
        ("add_special", c_bool),
        ("parse_special", c_bool),
    ]


class ContextParams11434(Structure):
    """`struct llama_context_params` of b11434: `ContextParams` without its field `moe_cache_size`."""

    _fields_: ClassVar = [field for field in ContextParams._fields_ if field[0] != "moe_cache_size"]
    defaults: ClassVar[dict[str, Any]] = {
        name: value for name, value in ContextParams.defaults.items() if name != "moe_cache_size"
    }


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_version": (c_char_p, ()),
    "llama_backend_init": (None, ()),
    "llama_supports_gpu_offload": (c_bool, ()),
    "llama_max_devices": (c_size_t, ()),
    "ggml_backend_reg_count": (c_size_t, ()),
    "ggml_backend_load_all_from_path": (None, (c_char_p,)),
    "ggml_backend_dev_count": (c_size_t, ()),
    "ggml_backend_dev_get": (c_void_p, (c_size_t,)),
    "ggml_backend_dev_name": (c_char_p, (c_void_p,)),
    "ggml_backend_dev_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "llama_log_set": (None, (_LogCallback, c_void_p)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_chat_template": (c_char_p, (c_void_p, c_char_p)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_vocab_bos": (c_int32, (c_void_p,)),
    "llama_vocab_get_add_bos": (c_bool, (c_void_p,)),
    "llama_vocab_eos": (c_int32, (c_void_p,)),
    "llama_vocab_get_text": (c_char_p, (c_void_p, c_int32)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_detokenize": (c_int32, (c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool)),
    "mtmd_default_marker": (c_char_p, ()),
    "mtmd_context_params_default": (MtmdParams, ()),
    "mtmd_init_from_file": (c_void_p, (c_char_p, c_void_p, MtmdParams)),
    "mtmd_free": (None, (c_void_p,)),
    "mtmd_support_vision": (c_bool, (c_void_p,)),
    "mtmd_decode_use_non_causal": (c_bool, (c_void_p, c_void_p)),
    "mtmd_bitmap_init": (c_void_p, (c_uint32, c_uint32, c_char_p)),
    "mtmd_bitmap_free": (None, (c_void_p,)),
    "mtmd_input_chunks_init": (c_void_p, ()),
    "mtmd_input_chunks_free": (None, (c_void_p,)),
    "mtmd_input_chunks_size": (c_size_t, (c_void_p,)),
    "mtmd_input_chunks_get": (c_void_p, (c_void_p, c_size_t)),
    "mtmd_input_chunk_get_type": (c_int, (c_void_p,)),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, (c_void_p,)),
    "mtmd_tokenize": (c_int32, (c_void_p, c_void_p, POINTER(InputText), POINTER(c_void_p), c_size_t)),
    "mtmd_helper_log_set": (None, (_LogCallback, c_void_p)),
    "mtmd_helper_get_n_tokens": (c_size_t, (c_void_p,)),
    "mtmd_helper_eval_chunks": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_bool, POINTER(c_int32)),
    ),
    "mtmd_helper_eval_chunk_single": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_bool, POINTER(c_int32)),
    ),
}

_OF_B11434: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_context_default_params": (ContextParams11434, ()),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams11434)),
}
"""Functions that take or give a structure which that release lays out differently."""

_SUFFIX: Final = ".dylib" if sys.platform == "darwin" else ".so"
_LOG_WARNING, _LOG_ERROR = 3, 4

_error_lines: deque[str] = deque(maxlen=8)


def _take_line(level: int, text: bytes, user_data: object) -> None:
    """Give llama.cpp's lines to Python's logging, quietly: what matters comes back as an exception."""
    line = text.decode("utf-8", "replace").strip()
    if not line:
        return
    if level == _LOG_ERROR:
        _error_lines.append(line)
    logger.log(logging.INFO if level in (_LOG_WARNING, _LOG_ERROR) else logging.DEBUG, line)


_log = _LogCallback(_take_line)


def last_errors() -> str:
    """llama.cpp's last error lines, oldest first, joined; cleared once read."""
    lines = "; ".join(_error_lines)
    _error_lines.clear()
    return lines or "llama.cpp gave no reason"


def library_build() -> int:
    """Number of the llama.cpp build in the installed `xllamacpp`; it is the last part of that package's version.

    Raises:
        MissingResourceError: the package is not installed, or its version names no build.
    """
    try:
        version = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        raise MissingResourceError(f"the package xllamacpp, which carries llama.cpp, is missing; {_WAY_OUT}") from None
    build = version.split("+")[0].split(".")[2:3]
    if not build or not build[0].isdigit():
        raise MissingResourceError(f"xllamacpp {version} names no llama.cpp build as its third number; {_WAY_OUT}")
    return int(build[0])


def library_path() -> Path:
    """The shared object inside the installed `xllamacpp`.

    Raises:
        MissingResourceError: it is not there.
    """
    path = embedded_library()
    if path is None:
        raise MissingResourceError(f"the package xllamacpp holds no shared object named xllamacpp.*; {_WAY_OUT}")
    return path


@cache
def library() -> ctypes.CDLL:
    """The embedded llama.cpp, loaded once, declared, checked and silenced.

    Raises:
        MissingResourceError: no `xllamacpp`, one too old, or one whose structures differ from those declared here.
    """
    build = library_build()
    if build < OLDEST_BUILD:
        raise MissingResourceError(
            f"xllamacpp carries llama.cpp build {build}, this version of mode-gguf needs {OLDEST_BUILD} or newer; "
            f"{_WAY_OUT}"
        )
    lib = load_library(library_path(), _FUNCTIONS, _WAY_OUT)
    _check_layout(
        lib,
        f"llama.cpp build {build} in xllamacpp",
        f"from build {OLDEST_BUILD}, for which this version of mode-gguf was written; install that one with: "
        f"pip install 'xllamacpp==2026.10.{OLDEST_BUILD}'",
    )
    _start(lib)
    return lib


@cache
def runtime_library(folder: Path) -> ctypes.CDLL:
    """A llama.cpp built with shared libraries, loaded once, declared, checked and silenced.

    Its functions are in libllama and libmtmd; a symbol that is asked of the latter is looked for in what it was linked
    with, too. Where its backends are libraries of their own, those in the folder are loaded.

    Args:
        folder: with its shared libraries, which find each other by their own RPATH.

    Raises:
        MissingResourceError: they are not there, cannot be loaded, or have other structures than declared here.
    """
    way_out = "name another build with --library, or make one with: mode-gguf runtime build --rebuild"
    name = f"llama.cpp in {folder}"
    known = (
        f"from builds b{B11434.build} and b{OLDEST_BUILD}, for which this version of mode-gguf was written; {way_out}"
    )
    path = folder / f"libmtmd{_SUFFIX}"
    try:
        lib = load_library(path, _FUNCTIONS, way_out)
        _check_layout(lib, name, known)
    except MissingResourceError:
        lib = load_library(path, {**_FUNCTIONS, **_OF_B11434}, way_out)
        _check_layout(lib, name, known)
    if lib.ggml_backend_reg_count() == 0:
        lib.ggml_backend_load_all_from_path(bytes(folder))
    _start(lib)
    return lib


def library_version() -> str:
    """Version text of the embedded llama.cpp, as in reports."""
    return f"llama.cpp b{library_build()} (xllamacpp {importlib.metadata.version('xllamacpp')})"


def _check_layout(lib: ctypes.CDLL, name: str, expected: str) -> None:
    """Read the library's default parameters; the two texts are for errors.

    Raises:
        MissingResourceError: a default parameter does not come out as documented.
    """
    mtmd = lib.mtmd_context_params_default()
    params = {
        "llama_model_params": lib.llama_model_default_params(),
        "llama_context_params": lib.llama_context_default_params(),
        "mtmd_context_params": mtmd,
    }
    wrong = [
        (struct, field)
        for struct, value in params.items()
        for field, default in value.defaults.items()
        if getattr(value, field) != default
    ]
    if mtmd.media_marker != lib.mtmd_default_marker():
        wrong.append(("mtmd_context_params", "media_marker"))
    if wrong:
        struct, field = wrong[0]
        raise MissingResourceError(f"{name} lays out {struct} differently (at {field}) {expected}")


def _start(lib: ctypes.CDLL) -> None:
    lib.llama_log_set(_log, None)
    lib.mtmd_helper_log_set(_log, None)
    lib.llama_backend_init()

"""python -m mode_gguf.llama_cpp.embedded_server SETTINGS: llama-server out of `xllamacpp`, until it is ended.

SETTINGS are those of `ServerSettings` as JSON. It ends with the process that started it, too.
"""

import json
import os
import signal
import sys
import time
from typing import Any

import xllamacpp

_POLL_SECONDS = 0.5
_ALL_LAYERS = 999


def parameters(settings: dict[str, Any]) -> xllamacpp.CommonParams:
    """xllamacpp's names of the settings."""
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    if settings["mmproj"]:
        params.mmproj.path = settings["mmproj"]
    params.hostnames = [settings["host"]]
    params.port = settings["port"]
    params.n_ctx = settings["context"]
    params.n_parallel = settings["parallel"]
    params.use_jinja = True
    if settings["kv_type"] != "f16":
        kind = xllamacpp.ggml_type[f"GGML_TYPE_{settings['kv_type'].upper()}"]
        params.cache_type_k = params.cache_type_v = kind
    if settings["planned"] or settings["kv_type"] != "f16":
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    if settings["planned"]:
        params.n_gpu_layers, params.fit_params = _ALL_LAYERS, False
    if settings["image_tokens"]:
        params.image_max_tokens = settings["image_tokens"]
    return params


def main() -> None:
    def end(*_: object) -> None:
        raise SystemExit

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    parent = os.getppid()
    server = xllamacpp.Server(parameters(json.loads(sys.argv[1])))
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    del server


if __name__ == "__main__":
    main()

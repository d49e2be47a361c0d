"""Logits of a GGUF file in a build of llama.cpp, in a process of its own: two builds do not fit in one.

    python logits_of_build.py REQUEST

REQUEST is `Request` in JSON. Exits with 1 where llama.cpp refuses the file; its reasons go to stderr.
"""

import json
import os
import sys
from ctypes import c_int8, c_int32
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mode_gguf.llama_cpp import c_api
from mode_gguf.llama_cpp.engines import Engine
from mode_gguf.llama_cpp.in_process import LlamaModel

THREADS = 2


@dataclass(frozen=True, slots=True)
class Request:
    """Request to the process; paths are strings.

    Attributes:
        build: folder with the build's libraries.
        model: text model.
        out: .npy file for the logits after every token, float32 (tokens, vocabulary).
        tokens: of the prompt and of what follows it; with an image, only of what follows the image and its question.
        prefill: as many tokens are one batch, the others follow one by one; not used with an image.
        repack: weights may be rearranged at load.
        mmproj: projector, if there is an image.
        image: picture that the prompt asks about.
    """

    build: str
    model: str
    out: str
    tokens: list[int]
    prefill: int
    repack: bool = False
    mmproj: str | None = None
    image: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def text_logits(request: Request) -> np.ndarray:
    """float32 (tokens, vocabulary); exits with 1 where llama.cpp refuses the file."""
    library = c_api.runtime_library(Path(request.build))
    model_params = library.llama_model_default_params()
    model_params.use_extra_bufts = request.repack
    model = library.llama_model_load_from_file(os.fsencode(request.model), model_params)
    if model is None:
        sys.exit(_refused())
    tokens = request.tokens
    params = library.llama_context_default_params()
    params.n_ctx = params.n_outputs_max = params.n_outputs_max_per_seq = len(tokens)
    params.n_threads = params.n_threads_batch = THREADS
    context = library.llama_init_from_model(model, params)
    assert context is not None, c_api.last_errors()
    n_vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    rows = []
    for start, stop in [(0, request.prefill), *((i, i + 1) for i in range(request.prefill, len(tokens)))]:
        count = stop - start
        batch = c_api.Batch(
            n_tokens=count,
            token=(c_int32 * count)(*tokens[start:stop]),
            pos=(c_int32 * count)(*range(start, stop)),
            logits=(c_int8 * count)(*[True] * count),
        )
        assert library.llama_decode(context, batch) == 0, c_api.last_errors()
        rows.append(np.ctypeslib.as_array(library.llama_get_logits(context), (count, n_vocab)).copy())
    return np.concatenate(rows)


def image_logits(request: Request, image: str) -> np.ndarray:
    """Logits that predict each of the tokens after a question about the image, float32 (tokens, vocabulary)."""
    assert request.mmproj is not None
    engine = Engine("the build that is tested", Path(request.build))
    model = LlamaModel(Path(request.model), Path(request.mmproj), context=1024, threads=THREADS, engine=engine)
    with model:
        return model.logits(f"{model.image_marker}What is this?", request.tokens, Path(image))


def _refused() -> int:
    print(c_api.last_errors(), file=sys.stderr)
    return 1


if __name__ == "__main__":
    request = Request(**json.loads(sys.argv[1]))
    np.save(request.out, image_logits(request, request.image) if request.image else text_logits(request))

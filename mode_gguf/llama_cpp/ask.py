"""python -m mode_gguf.llama_cpp.ask MODEL MMPROJ IMAGE QUESTION [--threads N]: the greedy answer on stdout.

The embedded llama.cpp in a process of its own, for the smoke test: a file that makes llama.cpp abort ends this process
and not the caller's.
"""

import argparse
import sys
from pathlib import Path

from mode_gguf.errors import ModeGgufError
from mode_gguf.llama_cpp.in_process import LlamaModel

MAX_TOKENS = 48


def ask(model_path: Path, mmproj: Path, image: Path, question: str, threads: int | None) -> str:
    """The model's greedy answer, at most `MAX_TOKENS` tokens; raises as `LlamaModel` does."""
    with LlamaModel(model_path, mmproj, threads=threads) as model:
        prompt = model.chat_template.question(question, model.image_marker)
        return model.detokenize(model.generate(prompt, image, max_tokens=MAX_TOKENS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("mmproj", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    try:
        answer = ask(given.model, given.mmproj, given.image, given.question, given.threads)
    except ModeGgufError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.buffer.write(answer.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

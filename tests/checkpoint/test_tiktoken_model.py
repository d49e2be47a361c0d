import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from mode_gguf.checkpoint import tiktoken_model
from mode_gguf.errors import InputError
from mode_gguf.export.tokenizer import add_tokenizer_keys, read_vocabulary
from tests.families.pico.kimi import RANKS, VOCAB, special


def by_the_rule(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """tiktoken's rule, as it is described."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        unions = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not unions:
            return [ranks[part] for part in parts]
        _, i = min(unions)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_tokens_of_words(pico_kimi_vl: Path) -> None:
    ranks = dict(tiktoken_model.read_ranks(pico_kimi_vl / tiktoken_model.FILE))
    tokenizer = Tokenizer.from_str(json.dumps(tiktoken_model.tokenizer_json(pico_kimi_vl)))
    for word in ("The", " square", " triangle", " colour", " images", "你好", " doesn't", "!", "\n\n"):
        assert tokenizer.encode(word).ids == by_the_rule(ranks, word.encode()), word
    assert tokenizer.encode("a<|im_end|>").ids == [ranks[b"a"], special("<|im_end|>")]


def test_pieces(pico_kimi_vl: Path) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tiktoken_model.tokenizer_json(pico_kimi_vl)))
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("HelloWorld 12345你好world it's")
    assert [span for _, span in pieces] == [(0, 5), (5, 10), (10, 11), (11, 14), (14, 16), (16, 18), (18, 23), (23, 28)]


def test_keys(pico_kimi_vl: Path) -> None:
    vocabulary = read_vocabulary(pico_kimi_vl, VOCAB)
    assert vocabulary.tokenizer.pre_tokenizer == "kimi-k2"
    assert vocabulary.tokens[RANKS : RANKS + 2] == ["[BOS]", "[EOS]"]
    assert vocabulary.tokens[VOCAB - 1] == f"<|reserved_token_{VOCAB - 1}|>"
    assert vocabulary.token_types == [TokenType.NORMAL] * RANKS + [TokenType.CONTROL] * 256
    writer = GGUFWriter(None, "test")
    add_tokenizer_keys(writer, pico_kimi_vl, VOCAB)
    keys = {key: value.value for key, value in writer.kv_data[0].items()}
    assert len(keys["tokenizer.ggml.merges"]) == RANKS - 256
    assert keys["tokenizer.ggml.eos_token_id"] == special("[EOS]")
    assert "media_pad" in keys["tokenizer.chat_template"]


@pytest.mark.parametrize("text", ["", "!!! 0\n", "YQ== 1\n", "YQ==\n"])
def test_broken_file(pico_kimi_vl: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(pico_kimi_vl, tmp_path / "other")
    (folder / tiktoken_model.FILE).write_text(text)
    with pytest.raises(InputError, match=r"tiktoken\.model: expected"):
        read_vocabulary(folder, VOCAB)

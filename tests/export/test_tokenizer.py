import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType

from mode_gguf.errors import InputError
from mode_gguf.export.tokenizer import add_tokenizer_keys, read_vocabulary
from tests.families.pico import tokenizer as pico_tokenizer


@pytest.fixture
def folder(pico: Path, tmp_path: Path) -> Path:
    """A copy of the pico checkpoint whose tokenizer a test may change."""
    return shutil.copytree(pico, tmp_path / "checkpoint")


def edit(folder: Path, change: Any, file: str = "tokenizer.json") -> None:
    path = folder / file
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))


def keys(folder: Path, **options: Any) -> dict[str, Any]:
    writer = GGUFWriter(None, "test")
    add_tokenizer_keys(writer, folder, pico_tokenizer.VOCAB, **options)
    return {key: value.value for key, value in writer.kv_data[0].items()}


def test_vocabulary(pico: Path) -> None:
    vocabulary = read_vocabulary(pico, pico_tokenizer.VOCAB)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pico)
    assert vocabulary.tokens[:407] == tokenizer.convert_ids_to_tokens(range(407))
    assert vocabulary.token_types[399:408] == [TokenType.NORMAL, *[TokenType.CONTROL] * 7, TokenType.UNUSED]
    assert vocabulary.tokens[407:] == [f"[PAD{i}]" for i in range(407, pico_tokenizer.VOCAB)]
    assert vocabulary.tokenizer.pre_tokenizer == "qwen2"


def test_keys(pico: Path) -> None:
    found = keys(pico)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "qwen2"
    assert found["tokenizer.ggml.eos_token_id"] == 402
    assert found["tokenizer.ggml.padding_token_id"] == 400
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert len(found["tokenizer.ggml.merges"]) == 400 - 256
    assert found["tokenizer.chat_template"] == pico_tokenizer.CHAT_TEMPLATE


def test_a_tokenizer_in_pieces_says_the_same(folder: Path, pico: Path) -> None:
    """vocab.json and merges.txt, as repositories have it that were saved with the slow tokenizer."""
    (folder / "tokenizer.json").unlink()
    assert keys(folder) == keys(pico)
    edit(folder, lambda config: config.update(tokenizer_class="OtherTokenizer"), "tokenizer_config.json")
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        keys(folder)


def test_chat_template_file(folder: Path) -> None:
    """transformers 5 saves it beside the tokenizer's configuration."""
    edit(folder, lambda config: config.pop("chat_template"), "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert keys(folder)["tokenizer.chat_template"] == "{{ messages }}"


def test_tokens_that_are_added_but_not_special(folder: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer["added_tokens"] += [
            {"id": 407, "content": "<tool_call>", "special": False},
            {"id": 408, "content": "<|fim_prefix|>", "special": False},
        ]

    edit(folder, change)
    vocabulary = read_vocabulary(folder, pico_tokenizer.VOCAB)
    assert vocabulary.tokens[407:409] == ["<tool_call>", "<|fim_prefix|>"]
    assert vocabulary.token_types[407:409] == [TokenType.USER_DEFINED, TokenType.CONTROL]


class TestPreTokenizer:
    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
            lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0),
            lambda t: t.update(normalizer=None),
            lambda t: t.update(normalizer={"type": "NFKC"}),
            lambda t: t.update(pre_tokenizer=None),
        ],
    )
    def test_unknown_is_refused_unless_named(self, folder: Path, change: Any) -> None:
        edit(folder, change)
        with pytest.raises(InputError, match=r"checkpoint\.pre_tokenizer"):
            keys(folder)
        assert keys(folder, pre_tokenizer="llama-bpe")["tokenizer.ggml.pre"] == "llama-bpe"


class TestRefusals:
    def test_missing_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").unlink()
        with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
            keys(folder)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda t: t["model"].update(type="Unigram"), "BPE"),
            (lambda t: t["model"].update(vocab=[]), "BPE"),
            (lambda t: t["model"]["vocab"].update(a=pico_tokenizer.VOCAB), "512 rows"),
            (lambda t: t["model"]["vocab"].update(a="x"), "512 rows"),
            (lambda t: t["model"]["vocab"].update(brandnew=0), "share id 0"),
            (lambda t: t["added_tokens"].append({"content": "x"}), "added tokens"),
            (lambda t: t.update(added_tokens=3), "added tokens"),
            (lambda t: t["model"].update(merges=[]), "merges"),
            (lambda t: t["model"].update(merges=[1, 2]), "merges"),
        ],
    )
    def test_broken_tokenizer(self, folder: Path, change: Any, words: str) -> None:
        edit(folder, change)
        (folder / "merges.txt").unlink()
        with pytest.raises(InputError, match=words):
            keys(folder)

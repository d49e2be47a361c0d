"""Tokens and their purposes from every file that may name them: what transformers says, for every id."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType

from mode_gguf.architectures import find_family
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.tokenizer import add_tokenizer_keys, checked_vocabulary, read_vocabulary
from mode_gguf.forward.inputs import check_inputs
from mode_gguf.forward.tokenizer import check_tokens, open_tokenizer
from tests.e2e.conftest import Run, ended, run, samples
from tests.families.pico.tokenizer import SPECIAL_TOKENS, TRAINED, VOCAB

__all__ = ["ended", "run"]

Change = Callable[[Path], None]
Tokens = dict[str, Any]
IDS = {token: TRAINED + number for number, token in enumerate(SPECIAL_TOKENS)}
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def edit(folder: Path, name: str, change: Callable[[Tokens], Any]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    write(folder, name, content)


def configured(**settings: Any) -> Change:
    """tokenizer_config.json with further settings, and those that are None left out."""

    def change(config: Tokens) -> None:
        config |= settings
        for name in [name for name, value in settings.items() if value is None]:
            del config[name]

    return lambda folder: edit(folder, "tokenizer_config.json", change)


def in_pieces(folder: Path) -> None:
    """As the slow tokenizers of transformers 4 were saved at first."""
    (folder / "tokenizer.json").unlink()
    edit(folder, "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    write(folder, "added_tokens.json", IDS)


def with_map(**tokens: Any) -> Change:
    """In pieces, with the purposes of tokens in a file of their own."""

    def change(folder: Path) -> None:
        in_pieces(folder)
        configured(eos_token=None, pad_token=None)(folder)
        write(folder, "special_tokens_map.json", tokens)

    return change


def without_decoder(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))


def map_beside(folder: Path) -> None:
    without_decoder(folder)
    write(folder, "special_tokens_map.json", {"eos_token": "<|endoftext|>"})


def list_of_tokens(folder: Path) -> None:
    in_pieces(folder)
    write(folder, "added_tokens.json", ["<|im_end|>"])


def two_opinions(folder: Path) -> None:
    """tokenizer.json has a plain token that tokenizer_config.json calls special, and the other way round."""
    flags = {token["content"]: token for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    plain, special = list(flags)[2:4]
    edit(folder, "tokenizer.json", lambda t: [x.update(special=x["content"] != plain) for x in t["added_tokens"]])
    decoder = {str(token["id"]): {**token, "special": token["content"] != special} for token in flags.values()}
    for token in decoder.values():
        del token["id"]
    configured(added_tokens_decoder=decoder)(folder)


def object_of(token: str) -> Tokens:
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


CHANGES: dict[str, Change] = {
    "as published": lambda folder: None,
    "added_tokens.json alone": in_pieces,
    "map of strings": with_map(eos_token="<|im_end|>", pad_token="<|im_start|>"),
    "map of objects": with_map(eos_token=object_of("<|im_end|>"), pad_token=object_of("<|vision_start|>")),
    "map with further ones": with_map(
        eos_token="<|im_end|>", additional_special_tokens=["<|vision_start|>", "<|image_pad|>"]
    ),
    "map without an end": with_map(pad_token="<|im_start|>"),
    "map beside tokenizer.json": map_beside,
    "tokenizer.json alone": without_decoder,
    "an object in the configuration": configured(eos_token={"__type": "AddedToken", **object_of("<|endoftext|>")}),
    "nothing said of padding": configured(pad_token=None),
    "further ones in a list": configured(extra_special_tokens=["<|vision_start|>", "<new>"]),
    "further ones by name": configured(extra_special_tokens={"image_token": "<|image_pad|>", "fresh_token": "<new>"}),
    "further ones, old name": configured(additional_special_tokens=["<|vision_end|>", "<new>"]),
    "one under a name of its own": configured(image_token="<|image_pad|>", fresh_token="<new>"),
    "padding that nothing has": configured(pad_token="[PAD]"),
    "a word as padding": configured(pad_token="The"),
    "two opinions": two_opinions,
}
"""Ways to say what a tokenizer's files can."""


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("of", ["pico", "pico_glm4v", "pico_qwen3_5"])
def test_as_transformers_says(request: pytest.FixtureRequest, tmp_path: Path, of: str, change: Change) -> None:
    folder = shutil.copytree(request.getfixturevalue(of), tmp_path / "checkpoint")
    change(folder)
    if of != "pico" and not (folder / "tokenizer.json").exists():
        with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
            checked_vocabulary(Checkpoint.open(folder))
        return
    checkpoint = Checkpoint.open(folder)
    family = find_family(checkpoint)
    theirs = open_tokenizer(checkpoint, family)
    ours = read_vocabulary(folder, VOCAB, None, family.tokenizer)
    size = len(theirs)
    assert ours.tokens[:size] == theirs.convert_ids_to_tokens(range(size))
    special = {number for number, token in theirs.added_tokens_decoder.items() if token.special}
    plain = theirs.added_tokens_decoder.keys() - special
    for number, kind in enumerate(ours.token_types):
        marked = ours.tokens[number].startswith("<|") and ours.tokens[number].endswith("|>")
        expected = TokenType.CONTROL if number in special or (number in plain and marked) else TokenType.USER_DEFINED
        expected = expected if number in special | plain else TokenType.NORMAL
        assert kind is (expected if number < size else TokenType.UNUSED), ours.tokens[number]
    writer = GGUFWriter(None, "test")
    add_tokenizer_keys(writer, folder, VOCAB, None, family.tokenizer)
    found = {key.removeprefix("tokenizer.ggml."): value.value for key, value in writer.kv_data[0].items()}
    for role, name in ROLES.items():
        expected_id = getattr(theirs, f"{role}_token_id")
        if role in family.tokenizer.special_tokens:  # llama.cpp's own
            continue
        if expected_id is not None or role not in ("bos", "eos", "pad"):  # config.json may name those
            assert found.get(f"{name}_token_id") == expected_id, role
    check_tokens(checkpoint, theirs, ours.tokens)
    check_inputs(checkpoint, tokens=ours.tokens)


def in_json(change: Callable[[Tokens], Any]) -> Change:
    return lambda folder: edit(folder, "tokenizer.json", change)


def pointer(folder: Path) -> None:
    in_pieces(folder)
    (folder / "merges.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def hole(folder: Path) -> None:
    in_pieces(folder)
    write(folder, "added_tokens.json", IDS | {"<late>": VOCAB - 20})


def beyond(folder: Path) -> None:
    in_pieces(folder)
    write(folder, "added_tokens.json", IDS | {"<late>": VOCAB})


def shared(folder: Path) -> None:
    in_pieces(folder)
    write(folder, "added_tokens.json", IDS | {"<late>": TRAINED})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda folder: edit(folder, "tokenizer.json", lambda t: t["model"]["vocab"].update({"\ud800": 450})),
            "Unicode",
        ),
        (
            lambda folder: edit(folder, "tokenizer.json", lambda t: t["model"]["merges"].append(["\ud800", "a"])),
            "merges",
        ),
        (lambda folder: edit(folder, "tokenizer.json", lambda t: t["model"].update(merges=[])), "no merges found"),
        (pointer, "merges.txt: a Git LFS pointer"),
        (hole, f"added_tokens.json: token '<late>' has id {VOCAB - 20}, and transformers gives it 407"),
        (beyond, f"added_tokens.json: token '<late>' has id {VOCAB}, expected less than the {VOCAB} rows"),
        (shared, f"token '<late>' has id {TRAINED}, and transformers gives it {TRAINED + 1}"),
        (configured(added_tokens_decoder=3), "tokenizer_config.json: added tokens cannot be read"),
        (configured(eos_token=7), "tokenizer_config.json: added tokens cannot be read"),
        (with_map(eos_token=["<|im_end|>"]), "added tokens cannot be read"),
        (list_of_tokens, "a JSON object"),
        (in_json(lambda t: t["model"]["vocab"].update(zzz=VOCAB)), "512 rows"),
    ],
    ids=[
        "half a character",
        "a merge of half one",
        "no merges",
        "merges pointer",
        "hole",
        "beyond",
        "shared",
        "decoder",
        "end",
        "map",
        "list",
        "vocabulary",
    ],
)
def test_refusals(run: Run, pico: Path, tmp_path: Path, change: Change, says: str) -> None:
    """By the public command, before anything is measured."""
    folder = shutil.copytree(pico, tmp_path / "checkpoint")
    change(folder)
    assert says in run("calibrate", folder, "--out", tmp_path / "out", *samples(1, 1), code=4)


def test_the_file_that_is_converted_has_them(run: Run, pico: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico, tmp_path / "checkpoint")
    in_pieces(folder)
    run("plan", folder, "--uniform", "Q8_0", "--out", tmp_path / "out")
    run("export", folder, "--out", tmp_path / "out")
    (path,) = (file for file in (tmp_path / "out").glob("*.gguf") if not file.name.startswith("mmproj"))
    fields = GGUFReader(path).fields
    assert fields["tokenizer.ggml.tokens"].contents()[TRAINED : TRAINED + len(IDS)] == list(IDS)
    assert fields["tokenizer.ggml.eos_token_id"].contents() == IDS["<|im_end|>"]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([IDS["<|im_end|>"], IDS["<|endoftext|>"]], {}),  # llama.cpp knows it by its text
        ([IDS["<|im_end|>"], IDS["<|vision_end|>"]], {"eot": IDS["<|vision_end|>"]}),
        (IDS["<|vision_end|>"], {"eot": IDS["<|vision_end|>"]}),
        ([404, 403, 402, 406], {"eot": 404, "eom": 403}),
        ([True, "x", -1, VOCAB, None], {}),
    ],
)
def test_ends_of_generation(pico: Path, tmp_path: Path, ends: Any, expected: dict[str, int]) -> None:
    """Every token that transformers stops at ends an answer in llama.cpp, too."""
    folder = shutil.copytree(pico, tmp_path / "checkpoint")
    write(folder, "generation_config.json", {"eos_token_id": ends})
    writer = GGUFWriter(None, "test")
    add_tokenizer_keys(writer, folder, VOCAB)
    found = {role: writer.kv_data[0].get(f"tokenizer.ggml.{role}_token_id") for role in ("eot", "eom")}
    assert {role: value.value for role, value in found.items() if value} == expected

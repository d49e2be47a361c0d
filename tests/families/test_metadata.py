"""Metadata and vocabulary of every family: pinned keys, other spellings of the settings, tied embeddings."""

from pathlib import Path
from typing import Any

from mode_gguf.architectures import find_family, text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.tokenizer import read_vocabulary
from tests.families.cases import cases_with, each_of, every_layout
from tests.families.changed import changed
from tests.families.conftest import Families
from tests.families.family_case import Change, FamilyCase


def metadata(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of the text model, and of the projector."""
    family = find_family(checkpoint)
    return dict(family.text_metadata(checkpoint)), dict(family.projector_metadata(checkpoint))


@every_layout
def test_metadata(case: FamilyCase, layout: str, families: Families) -> None:
    text, projector = metadata(families.checkpoint(layout))
    assert (text, projector) == metadata(families.checkpoint(case.layouts[0])), "layouts differ"
    sizes = {
        "block_count": len(case.layers),
        "embedding_length": case.pico.HIDDEN,
        "expert_count": case.pico.EXPERTS,
        "expert_used_count": case.pico.TOP_K,
        "expert_feed_forward_length": case.pico.WIDTH,
    }
    for key, value in {**sizes, **case.text_keys}.items():
        assert text.get(f"{case.gguf_arch}.{key}") == value, key
    vision = {"vision.projection_dim": case.pico.HIDDEN, "vision.block_count": case.vision_blocks}
    for key, value in {**vision, **case.projector_keys}.items():
        assert projector.get(f"clip.{key}") == value, key


@each_of("changes", "change")
def test_changed_settings(case: FamilyCase, change: Change, families: Families, tmp_path: Path) -> None:
    checkpoint = families.checkpoint(case.layouts[0])
    text, projector = metadata(checkpoint)
    found = metadata(changed(checkpoint.path, tmp_path / "changed", change.section, **change.settings))
    for keys, prefix, before, now in (
        (change.text, case.gguf_arch, text, found[0]),
        (change.projector, "clip", projector, found[1]),
    ):
        if keys is None:
            assert now == before
        else:
            assert {key: now.get(f"{prefix}.{key}") for key in keys} == keys


@every_layout
def test_vocabulary(case: FamilyCase, layout: str, families: Families) -> None:
    checkpoint = families.checkpoint(layout)
    vocabulary = read_vocabulary(checkpoint.path, case.pico.VOCAB)
    assert vocabulary.tokenizer.pre_tokenizer == case.pre_tokenizer
    assert vocabulary.tokens[find_family(checkpoint).vision.image_token(checkpoint)] == case.image_token


@cases_with("tied")
def test_tied_embeddings_have_no_output_tensor(case: FamilyCase, tmp_path: Path) -> None:
    names = {tensor.name for tensor in text_tensors(Checkpoint.open(case.write(tmp_path / "tied", tied=True)))}
    assert "output.weight" not in names
    assert "token_embd.weight" in names

"""Key vision tokens by every criterion, against attention and distances computed whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import UsageError
from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.key_tokens import (
    LayerAttention,
    key_vision_tokens,
    most_diverse,
    received_attention,
    text_attention,
)
from mode_gguf.forward.modality import TEXT_ATTENTION, KeyTokens
from mode_gguf.vocabulary import KEY_TOKEN_RULES, KeyTokenRule

LENGTH, FIRST, N_VISION = 14, 2, 8
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()
IS_VISION = (torch.arange(LENGTH) >= FIRST) & (torch.arange(LENGTH) < FIRST + N_VISION)
IS_QUERY = torch.arange(LENGTH) > FIRST + N_VISION
IMAGE = {"pixel_values": torch.ones(4, 3)}
INPUTS = ModelInputs("test", torch.arange(LENGTH), IS_VISION, IS_QUERY, torch.arange(LENGTH - 1), IMAGE)


@pytest.fixture
def attention() -> LayerAttention:
    torch.manual_seed(0)
    return LayerAttention(torch.randn(4, LENGTH, 8), torch.randn(2, LENGTH, 8), torch.randn(2, LENGTH, 8), None, 0.3)


def whole(attention: LayerAttention) -> torch.Tensor:
    """The layer's attention after softmax, (heads, S, S)."""
    keys = attention.key.repeat_interleave(2, 0)
    return (attention.query @ keys.mT * attention.scaling).masked_fill(~CAUSAL, -torch.inf).softmax(-1)


def scores_of_text(weights: torch.Tensor) -> torch.Tensor:
    return weights[:, IS_QUERY][:, :, IS_VISION].mean((0, 1))


def scores_of_all(weights: torch.Tensor) -> torch.Tensor:
    return torch.stack([weights[:, j + 1 :, j].mean() for j in range(FIRST, FIRST + N_VISION)])


@pytest.mark.parametrize("blocks", [False, True])
def test_attention_scores_with_masks_and_in_blocks(
    attention: LayerAttention, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks:
        monkeypatch.setattr("mode_gguf.forward.key_tokens._BLOCK_ELEMENTS", 4 * LENGTH * 3)
    weights = whole(attention)
    for mask in (None, CAUSAL[None, None], torch.where(CAUSAL, 0.0, -1e9)[None, None]):
        masked = replace(attention, mask=mask)
        torch.testing.assert_close(text_attention(masked, IS_QUERY, IS_VISION), scores_of_text(weights))
        torch.testing.assert_close(received_attention(masked, IS_VISION), scores_of_all(weights))


def test_most_diverse_is_the_greedy_farthest_point_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    features = torch.randn(9, 4)
    features[5] = 3 * features[2]  # the same direction twice: no distance between them
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = (1 - unit @ unit.T).fill_diagonal_(torch.inf)
    expected = [int(distance.amin(1).argmax())]
    while len(expected) < 9:
        left = [i for i in range(9) if i not in expected]
        expected.append(max(left, key=lambda i: float(distance[i, expected].min())))
    assert most_diverse(features, 8).tolist() == expected[:8]
    assert {2, 5} - set(most_diverse(features, 8).tolist()), "of two equal tokens one comes last"
    assert sorted(most_diverse(features, 9).tolist()) == list(range(9))
    monkeypatch.setattr("mode_gguf.forward.key_tokens._BLOCK_ELEMENTS", 2 * 9)
    assert most_diverse(features, 8).tolist() == expected[:8]
    assert sorted(most_diverse(torch.ones(3, 2), 3).tolist()) == [0, 1, 2]


def test_what_each_criterion_chooses(attention: LayerAttention) -> None:
    def chosen(criterion: KeyTokenRule) -> list[int]:
        return sorted(key_vision_tokens(KeyTokens(criterion, 0.25), INPUTS, 3, attention).tolist())

    weights = whole(attention)
    by_text, by_all = scores_of_text(weights), scores_of_all(weights)
    vision = torch.nonzero(IS_VISION)[:, 0]
    assert chosen("all") == vision.tolist()
    assert chosen("text-attention") == sorted(vision[by_text.topk(2).indices].tolist())
    assert chosen("redundant") == sorted(vision[by_text.topk(2, largest=False).indices].tolist())
    assert chosen("received-attention") == sorted(vision[by_all.topk(2).indices].tolist())
    values = torch.cat(list(attention.value[:, IS_VISION]), dim=-1)
    assert chosen("max-min-diversity") == sorted(vision[most_diverse(values, 2)].tolist())
    assert len({tuple(chosen(criterion)) for criterion in KEY_TOKEN_RULES}) == len(KEY_TOKEN_RULES), (
        "the test tells them apart"
    )


def test_random_tokens_differ_by_layer_sample_and_seed_and_come_again(attention: LayerAttention) -> None:
    def drawn(seed: int = 1, layer: int = 0, inputs: ModelInputs = INPUTS) -> tuple[int, ...]:
        found = key_vision_tokens(KeyTokens("random", 0.5, seed), inputs, layer, attention)
        assert IS_VISION[found].all()
        assert len(set(found.tolist())) == 4
        return tuple(sorted(found.tolist()))

    assert drawn() == drawn() == drawn(inputs=replace(INPUTS, origin="elsewhere"))
    other_text = replace(INPUTS, input_ids=INPUTS.input_ids + 1)
    other_image = replace(INPUTS, image={"pixel_values": torch.zeros(4, 3)})
    for vary in (
        [drawn(seed=seed) for seed in range(9)],
        [drawn(layer=layer) for layer in range(9)],
        [drawn(), drawn(inputs=other_text), drawn(inputs=other_image)],
    ):
        assert len(set(vary)) > 1


@pytest.mark.parametrize(("ratio", "count"), [(0.2, 1), (0.5, 2), (1.0, 5), (0.01, 1)])
def test_number_of_key_tokens(ratio: float, count: int) -> None:
    assert KeyTokens(ratio=ratio).count(5) == count


def test_what_does_not_matter_is_dropped() -> None:
    assert KeyTokens("all", 0.3, 7) == KeyTokens("all")
    assert KeyTokens("redundant", 0.3, 7) == KeyTokens("redundant", 0.3)
    assert KeyTokens("random", 0.3, 7) != KeyTokens("random", 0.3)
    assert (str(KeyTokens("random", 0.3, 7)), str(TEXT_ATTENTION)) == (
        "random, ratio 0.3, seed 7",
        "text-attention, ratio 0.2",
    )


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="unknown criterion of key tokens 'best': choose from text-attention, all"):
        KeyTokens("best")  # type: ignore[arg-type]
    for ratio in (0, -0.1, 1.1):
        with pytest.raises(UsageError, match=f"key ratio {ratio} is out of range"):
            KeyTokens(ratio=ratio)


@pytest.mark.parametrize("criterion", KEY_TOKEN_RULES)
def test_calibration_by_every_criterion(
    criterion: KeyTokenRule, pico: Path, samples: list[Sample], tmp_path: Path
) -> None:
    key = KeyTokens(criterion, 0.25, seed=3)
    statistics = calibrate(Checkpoint.open(pico), samples[2:4], device="cpu", key_tokens=key)
    n_vision = 12, 15
    expected = sum(key.count(n) for n in n_vision)
    counts = statistics.arrays["blk.1.attn_q.weight.count"][:, 0]
    assert counts[1:].tolist() == [expected, sum(n_vision) - expected]
    statistics.save(tmp_path / "calibration.safetensors")
    assert CalibrationStatistics.load(tmp_path / "calibration.safetensors").key_tokens == key


def test_random_halves_make_the_whole(pico: Path, samples: list[Sample]) -> None:
    checkpoint, key = Checkpoint.open(pico), KeyTokens("random", 0.25, seed=3)
    halves = [calibrate(checkpoint, [one], device="cpu", key_tokens=key) for one in samples[2:4]]
    both = calibrate(checkpoint, samples[2:4], device="cpu", key_tokens=key)
    for layer in both.moe_layers:
        assert np.array_equal(halves[0].counts(layer) + halves[1].counts(layer), both.counts(layer))

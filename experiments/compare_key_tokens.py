"""Which criterion finds the vision tokens that matter: their share of what quantized experts cost image answers.

    mode-gguf calibrate CHECKPOINT --calibration SAMPLES --out FOLDER
    python experiments/compare_key_tokens.py CHECKPOINT --out FOLDER

Fisher sensitivity of every expert in one type, with all criteria on the same samples and label draws, so that only the
split between key and redundant vision tokens differs. First table: every layer's cost in nats per scored position, by
kind of answer and modality, as the first criterion splits it. Second table: of the image answers' cost that goes
through vision tokens, the share that key tokens carry; a criterion that tells nothing has the key ratio. The last
layer's output at vision tokens is not read by any answer, so it has none.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.table import Table

from experiment_command import add_json, add_measured_folder, command_parser, write_json
from mode_gguf import pipeline
from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.forward.inputs import ANSWERS
from mode_gguf.forward.limits import LABEL_DRAWS
from mode_gguf.forward.modality import KEY_VISION, MODALITIES, REDUNDANT_VISION, KeyTokens
from mode_gguf.importance.sensitivity import measure_sensitivity
<<<<<<< HEAD
from mode_gguf.options import CalibrationOptions
from mode_gguf.pipeline.stages.calibrate import stored_statistics
=======
from mode_gguf.importance.sensitivity_settings import SensitivityRequest
>>>>>>> main
from mode_gguf.quantization.packing import DEFAULT_PACKING
from mode_gguf.quantization.types import QUANT_TYPES, QuantType, quant_type
from mode_gguf.vocabulary import KEY_TOKEN_RULES, KeyTokenRule

IMAGE = ANSWERS.index("image")


def layer_costs(run: pipeline.Run, expert_type: QuantType, key: KeyTokens, draws: int) -> np.ndarray:
    """Cost of all experts of a layer in one type, summed: (layers, A, M)."""
    statistics = stored_statistics(run)
    table = measure_sensitivity(
<<<<<<< HEAD
        run.checkpoint,
        pipeline.calibration_samples(statistics.options),
        read_imatrix(run.folder.imatrix),
        expert_types=(expert_type,),
        dense_types=(QUANT_TYPES["Q8_0"],),
        statistics=replace(statistics, key_tokens=key),
        packing=DEFAULT_PACKING,
        label_draws=draws,
=======
        checkpoint,
        load_samples(source),
        read_imatrix(folder.imatrix),
        replace(statistics, key_tokens=key),
        SensitivityRequest(
            expert_types=(expert_type,), dense_types=(QUANT_TYPES["Q8_0"],), packing=DEFAULT_PACKING, label_draws=draws
        ),
>>>>>>> main
    ).table
    return np.stack(
        [table.arrays[f"blk.{layer}.ffn_exps.expert"][..., 0].sum(axis=-1) for layer in statistics.moe_layers]
    )


def key_share(costs: np.ndarray) -> np.ndarray:
    """Share of the image answers' cost through vision tokens that key ones carry: (layers,); NaN where none goes so."""
    key, redundant = costs[..., IMAGE, KEY_VISION], costs[..., IMAGE, REDUNDANT_VISION]
    vision = key + redundant
    share: np.ndarray = np.where(vision > 0, key / np.where(vision > 0, vision, 1), np.nan)
    return share


def split_table(costs: np.ndarray, title: str) -> Table:
    """Every layer's cost by answer and modality, and each one's share of its layer's answer."""
    table = Table("layer", title=title)
    for answer in ANSWERS:
        for modality in MODALITIES:
            table.add_column(f"{answer}\n{modality}", justify="right")
    for layer, by_answer in enumerate(costs):
        total = by_answer.sum(axis=1, keepdims=True)
        shares = by_answer / np.where(total > 0, total, 1)
        cells = [f"{c:.1e} {100 * s:4.0f} %" for c, s in zip(by_answer.flat, shares.flat, strict=True)]
        table.add_row(str(layer), *cells)
    return table


def share_table(shares: dict[str, np.ndarray], whole: dict[str, float], title: str) -> Table:
    """What key tokens carry, by criterion and layer, and in all layers together."""
    layers = len(next(iter(shares.values())))
    table = Table("criterion", *[f"layer {layer}" for layer in range(layers)], "all", title=title)
    for criterion, by_layer in shares.items():
        table.add_row(criterion, *[_percent(share) for share in (*by_layer, whole[criterion])])
    return table


def _percent(share: float) -> str:
    return "none" if np.isnan(share) else f"{100 * share:.0f} %"


def main() -> None:
    """Measure, print, and write the results."""
    parser = command_parser(__doc__)
    add_measured_folder(parser, "calibrate")
    add_json(parser)
    parser.add_argument(
        "--criteria", nargs="+", choices=KEY_TOKEN_RULES, default=[one for one in KEY_TOKEN_RULES if one != "all"]
    )
    parser.add_argument("--key-ratio", type=float, default=CalibrationOptions.key_ratio)
    parser.add_argument("--type", default="Q2_K", help="of all experts")
    parser.add_argument("--draws", type=int, default=LABEL_DRAWS)
    arguments = parser.parse_args()
    run = pipeline.open_model(arguments.checkpoint, arguments.out)
    criteria: Sequence[KeyTokenRule] = arguments.criteria
    costs: dict[str, np.ndarray] = {}
    for criterion in criteria:
        key = KeyTokens(criterion, arguments.key_ratio)
        costs[criterion] = layer_costs(run, quant_type(arguments.type), key, arguments.draws)
        print(criterion, key_share(costs[criterion]).round(3), flush=True)
    console = Console(width=140)
    first = criteria[0]
    console.print(split_table(costs[first], f"{run.checkpoint.name}: {arguments.type}, nats, key tokens by {first}"))
    shares = {criterion: key_share(found) for criterion, found in costs.items()}
    whole = {criterion: float(key_share(found.sum(axis=0))) for criterion, found in costs.items()}
    console.print(share_table(shares, whole, "image answers' cost through vision: share of the key tokens"))
    write_json(arguments.json, {criterion: found.tolist() for criterion, found in costs.items()})


if __name__ == "__main__":
    main()

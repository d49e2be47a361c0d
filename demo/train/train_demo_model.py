"""Train the demo checkpoint: a small Qwen3-VL-MoE that really learned something, stored like public ones.

It memorises Python documentation and source, made-up facts in several wordings and languages, and 1,700
records that are asked for by a sign or an emblem, in writing or in a picture. The committed checkpoint was
made with

    python demo/train/train_demo_model.py --device cpu

in about 35 minutes on two shared cores. That run was stopped and resumed where a stage ends, to decide on
the next; STAGES and RATES below are what was run. `--evaluate` measures a written checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from demo_data.batches import Batcher, Knowledge, knowledge, to_patches
from demo_data.evaluation import Loader, evaluate, load, load_sets, predictions, verdicts
from demo_data.export import write_checkpoint
from demo_data.network import FastForward, Shape, build
from demo_data.pictures import KINDS
from demo_data.records import COLOURS, LETTERS, N_EMBLEMS, N_FIRST, SHAPES, SYMBOLS
from demo_data.sets import write_calibration, write_held_out, write_larger_calibration, write_larger_held_out

NAME = "Demo-VL-MoE"
"""Of the checkpoint: its folder, and what files made from it are called after."""
SEED = 7
TOWER_STEPS, NEIGHBOUR_STEPS = 260, 450
TOWER_RATE = 2e-3
WARMUP = 40
BALANCE = 0.001
GUIDE = 0.3


@dataclass(frozen=True)
class Stage:
    """A part of the main training: rows of each kind in a batch, and how strongly to guide attention."""

    until: int
    rows: dict[str, int]
    guide: float
    records: int  # how many signs, and how many emblems, are taught


# First text and the records, recalled right after their keys; the pictures are hardly used yet. Then the
# tower learns which cells belong together, and the language model is shown where to look. Then more records,
# twice, stopping while the margins are thin: 115 steps later every record was certain, and Q2_K cost answers
# about pictures only 0.009 nats.
STAGES = (
    Stage(543, {"pictures": 7, "texts": 4, "facts": 1, "asked": 4}, 0.0, N_FIRST),
    Stage(706, {"pictures": 9, "texts": 5, "facts": 1, "asked": 1}, GUIDE, N_FIRST),
    Stage(912, {"pictures": 8, "texts": 5, "facts": 1, "asked": 2}, GUIDE, 724),
    Stage(1007, {"pictures": 7, "texts": 4, "facts": 3, "asked": 2}, GUIDE, N_EMBLEMS),
)
STEPS = STAGES[-1].until
# Learning rate at these steps, linear in between.
RATES = ((0, 6e-5), (40, 2.5e-3), (790, 2.5e-3), (912, 1.6634e-3), (STEPS, 1.1477e-03))
# Tokens of answers are few and carry the knowledge that pictures ask for, so they count more.
ROW_WEIGHT = {"pictures": 2.0, "texts": 1.0, "facts": 1.0, "asked": 2.0}
SAVE_SECONDS = 150


class CellReader(nn.Module):
    """Linear heads that name what a token's cell shows; they exist only while the tower warms up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, len(KINDS))
        self.what = nn.Linear(width, len(LETTERS) + len(SHAPES) + len(SYMBOLS))
        self.colour = nn.Linear(width, len(COLOURS))
        self.part = nn.Linear(width, 2 + len(SHAPES))

    def loss(self, features: Tensor, labels: Tensor, neighbours: bool) -> tuple[Tensor, float]:
        """Cross-entropy of the three heads, and the share of glyphs and shapes named correctly."""
        flat, truth = features.float().flatten(0, 1), labels.flatten(0, 2)
        part = truth[:, 3] >= 0
        offset = torch.zeros(len(KINDS), dtype=torch.long, device=truth.device)
        offset[KINDS.index("emblem")] = len(LETTERS)
        offset[KINDS.index("symbol")] = len(LETTERS) + len(SHAPES)
        shown = truth[:, 1] >= 0
        what = truth[shown, 1] + offset[truth[shown, 0]]
        logits = self.what(flat[shown])
        coloured = truth[:, 2] >= 0
        busy = truth[:, 0] > 0
        kind = functional.cross_entropy(self.kind(flat), truth[:, 0]) + functional.cross_entropy(
            self.kind(flat[busy]), truth[busy, 0]
        )
        total = (
            kind
            + functional.cross_entropy(logits, what)
            + functional.cross_entropy(self.colour(flat[coloured]), truth[coloured, 2])
        )
        if neighbours:
            total = total + functional.cross_entropy(self.part(flat[part]), truth[part, 3])
        return total, float((logits.argmax(-1) == what).float().mean())


def log(message: str) -> None:
    """Print with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def warm_up_tower(model: Any, batcher: Batcher, device: torch.device, neighbours: bool) -> None:
    """Teach the tower to recognise cells, as real towers come pre-trained."""
    forward = FastForward(model)
    heads = CellReader(model.config.text_config.hidden_size).to(device)
    parameters = [*model.model.visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, TOWER_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    steps = NEIGHBOUR_STEPS if neighbours else TOWER_STEPS
    for step in range(steps):
        rate = TOWER_RATE * min(1.0, (step + 1) / WARMUP, max(0.05, 2 * (1 - step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        shown = [batcher.picture() for _ in range(16)]
        patches = torch.from_numpy(np.stack([to_patches(p.pixels) for p in shown])).to(device)
        labels = torch.from_numpy(np.stack([p.labels for p in shown])).to(device)
        features = forward.vision(patches.to(forward.dtype))
        total, accuracy = torch.zeros((), device=device), 0.0
        # The same heads read the merged tokens and both deepstack features: one code for the language model.
        for feature in features:
            loss, accuracy = heads.loss(feature, labels, neighbours)
            total = total + loss
        # Keep the features near the size of the token embeddings they will stand beside.
        size = torch.stack([feature.float().pow(2).mean() for feature in features])
        total = total + 0.1 * (size - 0.05).clamp(min=0).sum()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            log(f"tower {step} loss {total.item():.3f} glyphs {accuracy:.3f} size {size.mean():.3f}")


def rate_at(step: int, hidden: int) -> float:
    """The learning rate of a step; wider networks take smaller ones, in proportion."""
    return float(np.interp(step, [at for at, _ in RATES], [rate for _, rate in RATES])) * Shape.hidden / hidden


def make_optimizer(model: Any) -> torch.optim.AdamW:
    """AdamW; norms, biases and embeddings do not decay."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim < 2 or "embed" in name else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, RATES[0][1], betas=(0.9, 0.95), fused=True)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    batch.ids, batch.scored, batch.patches = (t.to(device) for t in (batch.ids, batch.scored, batch.patches))
    batch.looks = batch.looks.to(device)
    return batch


@torch.no_grad()
def quick_check(forward: FastForward, batcher: Batcher, device: torch.device, count: int = 96) -> str:
    """Exact-match accuracy on new pictures, by kind of question."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for _ in range(count // 32):
        batch, kinds = batcher.asked(32)
        batch = to_device(batch, device)
        logits, target = forward.scored_logits(batch)
        rows = batch.scored[:, 1:].nonzero(as_tuple=True)[0]
        for i, kind in enumerate(kinds):
            own = rows == i
            hits[kind].append(bool((logits[own].argmax(-1) == target[own]).all()))
    return " ".join(f"{kind} {np.mean(hit):.2f}/{len(hit)}" for kind, hit in sorted(hits.items()))


def train(
    model: Any,
    known: Knowledge,
    state_path: Path,
    *,
    steps: int,
    minutes: float,
    device: torch.device,
    seed: int,
    balance_weight: float,
) -> None:
    """The main training, resumable from `state_path`."""
    batcher = Batcher(known, seed)
    checker = Batcher(known, seed + 500)
    hidden = model.config.text_config.hidden_size
    step = 0
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer = make_optimizer(model)
        optimizer.load_state_dict(state["optimizer"])
        batcher.load_state(state["batcher"])
        step = state["step"]
        log(f"resumed at step {step}")
    else:
        warm_up_tower(model, Batcher(known, seed + 900), device, neighbours=False)
        optimizer = make_optimizer(model)
    forward = FastForward(model)
    if step >= steps:
        return
    started = saved = time.monotonic()
    sums: dict[str, list[float]] = defaultdict(list)

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "batcher": batcher.state(),
            "step": step,
        }
        torch.save(state, state_path.with_suffix(".new"))
        state_path.with_suffix(".new").replace(state_path)

    while step < steps and time.monotonic() - started < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, hidden)
        stage = next(stage for stage in STAGES if step < stage.until)
        if step == STAGES[0].until:
            warm_up_tower(model, Batcher(known, seed + 901), device, neighbours=True)
        # Once the tower reads every cell it is frozen: weak gradients only made its features drift.
        model.model.visual.requires_grad_(not stage.guide)
        batcher.teach(stage.records)
        checker.teach(stage.records)
        batch = to_device(batcher.batch(**stage.rows), device)
        if not stage.guide:
            batch.looks = batch.looks[:0]
        logits, target = forward.scored_logits(batch)
        losses = functional.cross_entropy(logits, target, reduction="none")
        rows = batch.scored[:, 1:].nonzero(as_tuple=True)[0]
        weights = torch.tensor([ROW_WEIGHT[kind] for kind, n in stage.rows.items() for _ in range(n)], device=device)[
            rows
        ]
        balance = forward.balance_loss()
        total = (losses * weights).sum() / weights.sum() + balance_weight * balance
        if forward.look_loss is not None:
            total = total + stage.guide * forward.look_loss
            sums["look"].append(float(forward.look_loss.detach()))
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        first = 0
        for kind, n in stage.rows.items():
            sums[kind].append(float(losses.detach()[(rows >= first) & (rows < first + n)].mean()))
            first += n
        sums["balance"].append(float(balance.detach()))
        if step % 20 == 0:
            means = " ".join(f"{kind} {np.mean(values):.3f}" for kind, values in sums.items())
            log(f"step {step} {means} rate {rate_at(step, hidden):.1e} {(time.monotonic() - started):.0f} s")
            sums.clear()
        if step % 100 == 0:
            log(f"check {step}: {quick_check(forward, checker, device)}")
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
    save()


def check_reload(model: Any, checkpoint: Path, held_out: Path) -> float:
    """Largest difference between the trained model cast to bf16 and the checkpoint read back."""
    loaded = load(checkpoint)
    trained = copy.deepcopy(model).cpu().eval()
    for parameter in trained.parameters():
        parameter.data = parameter.data.bfloat16().float()
    texts, asked = load_sets(Loader(checkpoint), held_out)
    worst = 0.0
    for (a, _), (b, _) in zip(
        predictions(trained, texts[:4] + asked[:12]), predictions(loaded, texts[:4] + asked[:12]), strict=True
    ):
        worst = max(worst, float((a - b).abs().max()))
    return worst


def export(model: Any, known: Knowledge, shape: Shape, demo: Path, name: str) -> None:
    """The checkpoint and both data sets, and the proof that the checkpoint reads back as what was trained."""
    write_checkpoint(model, known.tokenizer, shape, demo / name)
    write_held_out(known, demo / "heldout")
    write_calibration(known, demo / "calibration")
    worst = check_reload(model, demo / name, demo / "heldout")
    log(f"wrote {demo}; largest log-probability difference after reloading: {worst:.2e}")
    if worst > 1e-3:
        raise SystemExit("the written checkpoint is not the trained model")


def report(demo: Path, name: str) -> None:
    """Measure the written checkpoint, print the criteria and write evaluation.json."""
    result = evaluate(demo / name, demo / "heldout")
    (demo / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table("criterion", "measured", "holds")
    for what, measured, holds in verdicts(result):
        table.add_row(what, measured, "yes" if holds else "NO")
    console = Console(width=100)
    console.print(table)
    console.print_json(json.dumps({key: result[key] for key in ("image_accuracy", "text_loss", "image_answer_loss")}))


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path(__file__).resolve().parents[1], help="output folder")
    parser.add_argument(
        "--state", type=Path, default=Path("demo-train/state.pt"), help="training state, kept for --resume"
    )
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    parser.add_argument("--steps", type=int, default=STEPS, help="stop after this step")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time (then --resume)")
    parser.add_argument("--export", action="store_true", help="only write what --state holds")
    parser.add_argument("--name", default=NAME, help="of the checkpoint's folder")
    parser.add_argument("--seed", type=int, default=SEED, help="of the weights and of the order of samples")
    for part in fields(Shape):
        parser.add_argument(f"--{part.name.replace('_', '-')}", type=int, default=part.default, help="of the network")
    parser.add_argument("--balance", type=float, default=BALANCE, help="weight of the load-balancing loss")
    parser.add_argument("--evaluate", action="store_true", help="only measure the written checkpoint")
    parser.add_argument("--larger-held-out", type=Path, help="only write a larger held-out set to this folder")
    parser.add_argument("--larger-calibration", type=Path, help="only write a larger calibration set to this folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


def main() -> None:
    """Train, write and measure."""
    args = parse_arguments()
    if args.evaluate:
        report(args.demo, args.name)
        return
    if args.larger_held_out:
        write_larger_held_out(knowledge(), args.larger_held_out)
    if args.larger_calibration:
        write_larger_calibration(knowledge(), args.larger_calibration)
    if args.larger_held_out or args.larger_calibration:
        return
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.state.exists() and not (args.resume or args.export):
        raise SystemExit(f"{args.state} exists: give --resume to continue it, or remove it")
    args.state.parent.mkdir(parents=True, exist_ok=True)
    known = knowledge()
    shape = Shape(**{part.name: getattr(args, part.name) for part in fields(Shape)})
    model = build(known.special(), args.seed, shape).to(device)
    train(
        model,
        known,
        args.state,
        steps=0 if args.export else args.steps,
        minutes=args.minutes,
        device=device,
        seed=args.seed,
        balance_weight=args.balance,
    )
    export(model, known, shape, args.demo, args.name)
    report(args.demo, args.name)


if __name__ == "__main__":
    main()

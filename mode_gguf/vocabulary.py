"""Closed sets of names that options, files and messages share, each written once.

Free of everything else, so that the command line knows them without loading the library.
"""

from typing import Final, Literal, TypeAlias, get_args

Device: TypeAlias = Literal["auto", "cuda", "cpu"]
"""Devices that torch computes on; `auto` is CUDA where torch finds it."""

KeyTokenRule: TypeAlias = Literal[
    "text-attention", "all", "redundant", "random", "received-attention", "max-min-diversity"
]
"""`text-attention`: vision tokens the text attends to most (the paper's); `redundant`: as many of those it attends to
least (the paper's "text + redundant" baseline); `all`: every one (its "text + all vision" baseline); `random`: drawn
anew for every sample and layer; `received-attention`: those that all later tokens, of text and image, attend to most;
`max-min-diversity`: those that differ most from each other (DivPrune)."""
KEY_TOKEN_RULES: Final[tuple[KeyTokenRule, ...]] = get_args(KeyTokenRule)

Method: TypeAlias = Literal["fisher", "expert-mse", "block-mse", "imatrix-error"]
"""Ways of measuring sensitivity. `fisher`: KL divergence from the full-precision model; `expert-mse`: squared error of
an expert's output (the paper's); `block-mse`: of the block's output; `imatrix-error`: squared weight error under the
importance matrix, for which no model runs."""

ImatrixKind: TypeAlias = Literal["plain", "fisher"]
"""`plain`: mean squares of a matrix's inputs, as llama-imatrix; `fisher`: the same weighed by gradients."""
IMATRIX_KINDS: Final[tuple[ImatrixKind, ...]] = get_args(ImatrixKind)

Combination: TypeAlias = Literal["sensitivity", "product", "frequency", "pmq", "random"]
"""Formulas of an expert's cost from sensitivity d, frequency f and weight error (relative, squared) e, per modality:

`sensitivity`: d; `product`: f d, the paper's; `frequency`: f e; `pmq`: f w^1.5 d with w the share of routing weight,
both over all tokens alike (MC-MoE's PMQ, whose squared error is d of expert-mse); `random`: a random number times e.
"""

BudgetScope: TypeAlias = Literal["model", "layer"]
"""Whether the whole model shares one budget, or every layer's experts have one of their own, of equal bits per
weight."""

DenseRule: TypeAlias = Literal["measured", "fixed"]
"""Whether attention, embedding and output are units of the programme, or all take one type, Q4_K where the budget
allows."""

Granularity: TypeAlias = Literal["tensor", "expert"]
"""Weights of one type: all experts of a layer's projection, as stock llama.cpp loads it, or an expert's projections."""

PackingMode: TypeAlias = Literal["exact", "refined"]
"""`exact`: the bytes that libggml would write; `refined`: scales, mins and levels of less error."""
PACKING_MODES: Final[tuple[PackingMode, ...]] = get_args(PackingMode)

Effort: TypeAlias = Literal["fast", "default", "max"]
"""Search effort of refined packing."""

Rounding: TypeAlias = Literal["nearest", "feedback"]
"""`nearest`: every weight by itself, as llama.cpp does; `feedback`: a row's errors make up for each other (GPTQ)."""

ProjectorType: TypeAlias = Literal["F16", "BF16", "F32", "Q8_0"]
"""Types of the projector's matrices."""

MtpType: TypeAlias = Literal["Q8_0", "Q6_K", "Q4_K", "BF16", "F32"]
"""Types of the matrices of the block for multi-token prediction."""

KvType: TypeAlias = Literal["f16", "q8_0", "q4_0"]
"""Types of the KV cache that every build of llama.cpp has flash attention for."""

SplitMode: TypeAlias = Literal["none", "layer", "row", "tensor"]
"""Splits of a model over several GPUs (`-sm`)."""

ScoredAnswers: TypeAlias = Literal["reference", "given"]
"""Answers about pictures that are scored: the reference's own greedy ones, or the right ones of the questions."""

Tool: TypeAlias = Literal["llama-server", "llama-mtmd-cli", "llama-bench", "llama-perplexity"]
"""llama.cpp's programs that take a model."""

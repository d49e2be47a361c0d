"""Forms of a llama-server's answers: what is read of them, and within what bounds; all else is passed over.

Whoever answers may be another program, or mean harm: an answer that does not have its form is refused as a whole.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field

from mode_gguf.plain_text import one_line

MAX_VOCABULARY: Final = 1 << 20
"""Tokens; the largest vocabulary known has 262,144. Log-probabilities of all of them are kept for each position."""
_MAX_SIZE: Final = 1 << 50
_ROUNDING: Final = 1e-4
"""How far above 0 the logarithm of a probability may be that was computed in float32."""
_LEAST: Final = -3.5e38
"""Below float32's lowest number, which stands for the logarithm of 0."""
_NAME_LENGTH: Final = 200

Name: TypeAlias = Annotated[str, AfterValidator(lambda text: one_line(text, _NAME_LENGTH))]
"""What is shown to people: one line that cannot steer a terminal."""
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)]
LogProb: TypeAlias = Annotated[float, Field(ge=_LEAST, le=_ROUNDING, allow_inf_nan=False)]
_Size: TypeAlias = Annotated[int, Field(gt=0, le=_MAX_SIZE)]
_Special: TypeAlias = Annotated[str, Field(max_length=1000)]


class Answer(BaseModel):
    """Base of all forms: no text counts as a number, and no fraction as a whole one."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, protected_namespaces=())


class _ModelMeta(Answer):
    n_vocab: Annotated[int, Field(ge=2, le=MAX_VOCABULARY)]
    size: _Size
    n_params: _Size


class _Model(Answer):
    meta: _ModelMeta


def _first(models: Any) -> Any:
    if not isinstance(models, list) or not models:
        raise ValueError("a list of models was expected")
    return models[0]


class Models(Answer):
    """`/v1/models`: the first model's vocabulary, size in bytes and number of weights."""

    first: Annotated[_Model, BeforeValidator(_first)] = Field(alias="data")


class _Modalities(Answer):
    vision: bool = False


class Props(Answer):
    """`/props`: names of model and build, chat template, special tokens, and whether pictures are taken."""

    model_alias: Name
    build_info: Name
    chat_template: str
    model_path: str | None = None
    modalities: _Modalities = _Modalities()
    bos_token: _Special = ""
    eos_token: _Special = ""
    media_marker: Annotated[str, Field(min_length=1, max_length=1000)] = "<__media__>"


class Tokens(Answer):
    """`/tokenize`."""

    tokens: Annotated[list[TokenId], FailFast()]


class Text(Answer):
    """`/detokenize`."""

    content: str


class Generated(Answer):
    """`/completion`: the tokens of an answer, and why it ends."""

    tokens: Annotated[list[TokenId], FailFast()] = []
    stop_type: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A token and its log-probability; None is what llama-server writes where it computes no number."""

    id: TokenId
    logprob: LogProb | None


@dataclass(frozen=True, slots=True)
class Row(Entry):
    """A position: the token that came there, and the listed ones."""

    top_logprobs: Annotated[list[Entry], FailFast()]


class Listed(Answer):
    """`/completion` with `n_probs`: a row for each position."""

    completion_probabilities: Annotated[list[Row], FailFast()]

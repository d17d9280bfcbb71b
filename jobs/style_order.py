"""The fields that say what to train, checked by pydantic, and its complaints turned into sentences.

The limits of `parameters` are those of `jobs.lora_config.HyperParameters`, which is the only
place that knows them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import create_model as _create_model
from pydantic_core import ErrorDetails

from jobs.lora_config import LEFT_OUT, HyperParameters
from utils.captions import clean_caption
from utils.wording import counted

MAX_STYLE_ID = 2**63 - 1
MAX_IMAGES = 200
MAX_TAGS = 50
# Characters; what is longer is cut. The text encoder reads 77 tokens, and the report says so.
MAX_TAG = 200
MAX_CAPTION = 2000
MAX_SAMPLE_PROMPTS = 4
MAX_SAMPLE_PROMPT = 500
MAX_TRIGGER_WORD = 64
_STRICT = ConfigDict(strict=True, frozen=True, hide_input_in_errors=True)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]+")

PARAMETER_NAMES = tuple(field.name for field in dataclasses.fields(HyperParameters))


def _whole(value: Any) -> Any:
    """JSON knows no difference between 200 and 200.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _one_line(value: str) -> str:
    return _CONTROL.sub(" ", value).strip()


def checked_trigger_word(text: str) -> str:
    """A trigger word as it may be used, on one line.

    Raises:
        ValueError: It is too long, or would be several tags.
    """
    word = " ".join(text.split())
    if len(word) > MAX_TRIGGER_WORD:
        raise ValueError(f"must have at most {MAX_TRIGGER_WORD} characters")
    if clean_caption(word).problem:
        raise ValueError("must be valid Unicode text without control characters")
    if "," in word:
        raise ValueError("must be without commas, which part tags")
    return word


def _trigger_word(value: str) -> str:
    return checked_trigger_word(_one_line(value))


def _parameter_type(field: dataclasses.Field[Any], kind: Any) -> Any:
    limits = field.metadata
    if limits["choices"]:
        return Literal[limits["choices"]]
    bounds = Field(ge=limits["low"], le=limits["high"])
    if kind is bool:
        return bool
    if kind is int:
        return Annotated[int, BeforeValidator(_whole), bounds]
    return Annotated[float, Field(allow_inf_nan=False), bounds]


def _parameters_model() -> type[BaseModel]:
    kinds = typing.get_type_hints(HyperParameters)
    fields: dict[str, Any] = {
        field.name: (_parameter_type(field, kinds[field.name]) | None, None)
        for field in dataclasses.fields(HyperParameters)
    }
    return _create_model("Parameters", __config__=ConfigDict(**_STRICT, extra="forbid"), **fields)


Parameters = _parameters_model()
Caption = Annotated[str, AfterValidator(lambda text: _one_line(text)[:MAX_CAPTION].rstrip())]
Tag = Annotated[str, AfterValidator(lambda text: _one_line(text)[:MAX_TAG].rstrip())]
SamplePrompt = Annotated[
    str, AfterValidator(lambda text: _one_line(text)[:MAX_SAMPLE_PROMPT].rstrip())
]


class Order(BaseModel):
    """What a message of either dialect asks for; `images` stands for `image_urls` too."""

    model_config = _STRICT

    style_id: Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MAX_STYLE_ID)]
    images: Annotated[list[str | None], Field(min_length=1, max_length=MAX_IMAGES)]
    captions: list[Caption | None] | None = None
    tags: Annotated[list[Tag], Field(max_length=MAX_TAGS)] | None = None
    validation_images: Annotated[list[str | None], Field(max_length=MAX_IMAGES)] | None = None
    sample_prompts: Annotated[list[SamplePrompt], Field(max_length=MAX_SAMPLE_PROMPTS)] | None = (
        None
    )
    trigger_word: Annotated[str, AfterValidator(_trigger_word)] | None = None
    parameters: Parameters | None = None  # type: ignore[valid-type]  # made at import

    def given_parameters(self) -> dict[str, Any]:
        """The parameters that the message sets."""
        return self.parameters.model_dump(exclude_none=True) if self.parameters else {}


def complaints(error: ValidationError) -> list[tuple[list[str], str]]:
    """Each problem as its path and what is wrong there, without values that may be secret."""
    details = error.errors(include_url=False, include_context=True)
    return [([printable(str(part)) for part in one["loc"]], _reason(one)) for one in details]


def printable(name: str) -> str:
    """A name from a message, fit for a log line and a header."""
    text = repr(name)[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."


def _reason(problem: ErrorDetails) -> str:
    kind = problem["type"]
    limits = _with_nouns(problem.get("ctx", {}), "character" if "string" in kind else "entry")
    if kind == "extra_forbidden":
        return _unknown(str(problem["loc"][-1]))
    words = {
        "missing": "is required",
        "int_type": "must be a whole number",
        "bool_type": "must be true or false",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "string_type": "must be text",
        "string_unicode": "is not valid Unicode",
        "string_too_long": "must have at most {limit}",
        "list_type": "must be a list",
        "too_short": "must have at least {limit} and has {size}",
        "too_long": "must have at most {limit} and has {size}",
        "model_type": "must be an object",
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "literal_error": "must be {expected}",
        "value_error": "{error}",
    }
    reason = words.get(kind, problem["msg"]).format_map(limits)
    value = problem["input"]
    if kind != "missing" and isinstance(value, (bool, int, float)) and len(f"{value!r:.40}") < 40:
        reason += f" (it is {value!r})"
    return reason


def _with_nouns(limits: dict[str, Any], noun: str) -> dict[str, Any]:
    """pydantic's limits of a length, and the same as phrases: `1 entry`, `200 entries`."""
    limit = limits.get("min_length", limits.get("max_length"))
    if limit is None:
        return limits
    plural = "entries" if noun == "entry" else None
    size = limits.get("actual_length")
    return limits | {
        "limit": counted(limit, noun, plural),
        # pydantic stops counting where a list comes piece by piece; a message's never does.
        "size": "none" if size == 0 else f"{size:,}" if isinstance(size, int) else "more",
    }


def _unknown(name: str) -> str:
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    near = difflib.get_close_matches(name[:80], PARAMETER_NAMES, n=1)
    return "is not a parameter; " + (
        f"did you mean {near[0]}?" if near else f"the parameters are {', '.join(PARAMETER_NAMES)}"
    )

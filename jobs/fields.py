"""Checks the fields of an order, with error texts that name the field.

A kind states its parameters once, as a dataclass whose fields carry limits and a description
(`parameter`). The dataclass checks every instance (`check_limits`), and the check of messages
(`parameters_model`), the settings and the documentation are made from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic import create_model as _create_model
from pydantic_core import ErrorDetails

from utils.wording import counted

AUTO_WORD = "auto"
"""The value of a parameter in messages and settings that the kind finds for each job."""
MAX_COMPLAINTS = 5
LONGEST_NAME = 80
"""Characters of a name from a message in a log line or a header."""
STRICT = ConfigDict(strict=True, frozen=True, hide_input_in_errors=True)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]+")

M = TypeVar("M", bound=BaseModel)


class WrongField(Exception):
    """A field of an order is wrong.

    Args:
        field: The field, in the message's own spelling.
        reason: The problem, as a text that follows the name.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


class Order:
    """The fields of an order. It notes which of them a kind understands.

    Args:
        values: The fields by name.
        prefix: The prefix of the names in the message: `data.` or nothing.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str) -> None:
        self.prefix = prefix
        self._values = values
        self._understood: set[str] = set()
        self._unused: list[str] = []

    def has(self, name: str) -> bool:
        """Whether the order has a field. A field that is null counts as absent."""
        return self._values.get(name) is not None

    def get(self, name: str) -> Any:
        """A field's value, None if it is absent. The field counts as understood."""
        self._understood.add(name)
        return self._values.get(name)

    def at(self, name: str) -> str:
        """A field's name in the message's own spelling."""
        return f"{self.prefix}{name}"

    def leave_unused(self, *parts: str) -> None:
        """Note parts of fields that have no effect, such as `images.3?width`."""
        self._unused.extend(printable(self.at(part)) for part in parts)

    @property
    def understood(self) -> frozenset[str]:
        """Names of the fields that the kind has read."""
        return frozenset(self._understood)

    @property
    def unused(self) -> tuple[str, ...]:
        """Parts of fields that have no effect."""
        return tuple(self._unused)


class Auto(int):
    """The type of `AUTO`, which is no number that a record or a message can hold."""


AUTO = Auto(0)
"""`auto` in a dataclass of parameters."""

# ---- parameters ----------------------------------------------------------------------------------


def parameter(
    default: Any,
    doc: str,
    *,
    low: Any = None,
    high: Any = None,
    choices: tuple[str, ...] = (),
    setting: str | None = None,
    auto: bool = False,
) -> Any:
    """The field of a parameter.

    Args:
        low, high: The limits, inclusive; without `high` there is no upper limit.
        choices: The allowed values.
        setting: Name of its default's setting, in lower case, if it differs from the field's name.
        auto: The word `auto` is allowed in messages and settings; the kind finds the value for each
            job. The dataclass of the defaults then has `AUTO`, and no other does.
    """
    limits = {"doc": doc, "low": low, "high": high, "choices": choices, "setting": setting}
    limits["auto"] = AUTO if auto else None
    return dataclasses.field(default=default, metadata=limits)  # pylint: disable=invalid-field-call


def check_limits(parameters: Any) -> None:
    """Check each field of a dataclass of parameters against its limits.

    Raises:
        ValueError: A value is outside its limits. The text begins with the parameter's name.
    """
    for field in dataclasses.fields(parameters):
        value, limits = getattr(parameters, field.name), field.metadata
        if limits["choices"] and value not in limits["choices"]:
            raise ValueError(
                f"{field.name} is {value!r}; choose one of {', '.join(limits['choices'])}"
            )
        low, high = limits["low"], limits["high"]
        if limits["auto"] is not None and isinstance(value, Auto):
            continue
        # The negated comparisons catch NaN too.
        if low is not None and high is None and not low <= value:
            raise ValueError(f"{field.name} is {value}; it must be at least {low}")
        if low is not None and high is not None and not low <= value <= high:
            raise ValueError(f"{field.name} is {value}; it must be between {low} and {high}")


def parameters_model(kind: type[Any]) -> type[BaseModel]:
    """The pydantic model that checks the `parameters` of a message by the same limits.

    Args:
        kind: A dataclass of `parameter` fields.
    """
    types = typing.get_type_hints(kind)
    fields: dict[str, Any] = {
        field.name: (_parameter_type(field, types[field.name]) | None, None)
        for field in dataclasses.fields(kind)
    }
    return _create_model("Parameters", __config__=ConfigDict(**STRICT, extra="forbid"), **fields)


def _parameter_type(field: dataclasses.Field[Any], kind: Any) -> Any:
    limits = field.metadata
    if limits["choices"]:
        return Literal[limits["choices"]]
    if kind is str:
        return Annotated[str, Field(max_length=500)]
    bounds = Field(ge=limits["low"], le=limits["high"])
    if kind is bool:
        return bool
    if kind is int:
        whole = Annotated[int, BeforeValidator(_whole), bounds]
        return Annotated[whole, WrapValidator(_or_auto)] if limits["auto"] is not None else whole
    return Annotated[float, Field(allow_inf_nan=False), bounds]


# ---- types of fields -----------------------------------------------------------------------------


def _whole(value: Any) -> Any:
    """A whole number may be written `200.0` in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _or_auto(value: Any, number: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, str) and value != AUTO_WORD:
        raise ValueError(f'must be a whole number or "{AUTO_WORD}"')
    return value if value == AUTO_WORD else number(value)


def one_line(value: str) -> str:
    """Text without control characters and surrounding blanks."""
    return _CONTROL.sub(" ", value).strip()


def text(longest: int) -> Any:
    """The type of a text on one line; what exceeds `longest` characters is cut off."""
    return Annotated[str, AfterValidator(lambda value: one_line(value)[:longest].rstrip())]


def whole_number(low: int, high: int) -> Any:
    """The type of a whole number."""
    return Annotated[int, BeforeValidator(_whole), Field(ge=low, le=high)]


# ---- problems in words ---------------------------------------------------------------------------


def checked(
    model: type[M],
    values: Mapping[str, Any],
    order: Order,
    *,
    parameters: Sequence[str],
    left_out: Mapping[str, str],
    spelt: Mapping[str, str] | None = None,
) -> M:
    """Check an order's fields.

    Args:
        model: The pydantic model of the fields.
        values: The fields of the order.
        order: The order that the fields come from.
        parameters: Names of all parameters.
        left_out: For parameters that users may expect but that do not exist: the reason, by name.
        spelt: The names in the message of fields that have another name in the model.

    Raises:
        WrongField: Names the first wrong field, and the problems of the first few.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = []
        for one in error.errors(include_url=False, include_context=True)[:MAX_COMPLAINTS]:
            path = [printable(str(part)) for part in one["loc"]]
            path[0] = (spelt or {}).get(path[0], path[0])
            found.append((order.at(".".join(path)), _reason(one, parameters, left_out)))
        others = "".join(f"; {field}: {reason}" for field, reason in found[1:])
        raise WrongField(found[0][0], found[0][1] + others) from None


@contextlib.contextmanager
def naming_the_parameter(order: Order, parameters: Sequence[str]) -> Iterator[None]:
    """Raise the error of a parameter, whose text begins with the name, as a `WrongField`.

    Args:
        order: The order.
        parameters: Names of all parameters.
    """
    try:
        yield
    except ValueError as error:  # a rule beyond a plain limit
        name = next((one for one in parameters if str(error).startswith(f"{one} ")), None)
        field = f"parameters.{name}" if name else "parameters"
        raise WrongField(order.at(field), str(error)) from None


def printable(name: str) -> str:
    """A name from a message, made safe for a log line and a header."""
    shown = repr(name)[1:-1]
    return shown if len(shown) <= LONGEST_NAME else shown[: LONGEST_NAME - 3] + "..."


def _reason(problem: ErrorDetails, parameters: Sequence[str], left_out: Mapping[str, str]) -> str:
    kind = problem["type"]
    limits = _with_nouns(problem.get("ctx", {}), "character" if "string" in kind else "entry")
    if kind == "extra_forbidden":
        return _unknown(str(problem["loc"][-1]), parameters, left_out)
    words = {
        "missing": "is required",
        "int_type": "must be a whole number",
        "bool_type": "must be true or false",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "string_type": "must be text",
        "string_unicode": "is not valid Unicode",
        "string_pattern_mismatch": "must match {pattern}",
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
        # pydantic stops counting an iterable; a message's list is always counted.
        "size": "none" if size == 0 else f"{size:,}" if isinstance(size, int) else "more",
    }


def _unknown(name: str, parameters: Sequence[str], left_out: Mapping[str, str]) -> str:
    if name in left_out:
        return left_out[name]
    near = difflib.get_close_matches(name[:80], parameters, n=1)
    return "is not a parameter; " + (
        f"did you mean {near[0]}?" if near else f"the parameters are {', '.join(parameters)}"
    )

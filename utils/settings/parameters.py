"""Settings that are the defaults of a job's parameters, derived from the kind's own dataclass."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, create_model

from utils.settings.values import Group


class ParameterDefaults:
    """The settings of one kind of job.

    Args:
        kind: Name of the kind, which prefixes its settings (`STYLE_EPOCHS`).
        parameters: The kind's dataclass of parameters. It has every default, and its constructor
            checks the limits. If it has a method `require_libraries`, that is called too.
        setting_of: Parameters whose setting has another name.
    """

    def __init__(self, kind: str, parameters: type[Any], setting_of: Mapping[str, str]) -> None:
        self._parameters = parameters
        hints = typing.get_type_hints(parameters)
        fields: dict[str, Any] = {
            field.name: (
                Annotated[hints[field.name], AfterValidator(self._check(field.name))],
                field.default,
            )
            for field in dataclasses.fields(parameters)
        }
        self._model = create_model(f"{kind}_defaults", __base__=Group, **fields)
        self.settings = {setting_of.get(name, name): name for name in fields}
        """Setting, without its prefix and in lower case -> parameter."""

    def read(self, values: Mapping[str, Any]) -> Any:
        """The parameters' defaults, with these values over them.

        Raises:
            ValidationError: Lists every value that is wrong.
        """
        model = self._model.model_validate(values)
        return self._parameters(**dict(model))

    def _check(self, name: str) -> Any:
        return functools.partial(_within_the_limits, self._parameters, name)


def _within_the_limits(parameters: type[Any], name: str, value: Any) -> Any:
    checked = parameters(**{name: value})
    if hasattr(checked, "require_libraries"):
        checked.require_libraries()
    return value

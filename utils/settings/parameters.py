"""Settings that a kind of job states itself, as a dataclass with a default for every field."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ValidatorFunctionWrapHandler, WrapValidator, create_model

from utils.settings.values import Group


class DataclassSettings:
    """The settings of one kind that become one dataclass.

    The dataclass has the defaults, and its constructor checks the limits. A method
    `require_libraries`, if it has one, checks the machine. A field's setting has the field's name,
    unless the field's metadata names another `setting`. If its metadata has a value for `auto`, the
    setting may be that word.
    """

    def __init__(self, dataclass: type[Any]) -> None:
        self._dataclass = dataclass
        fields = dataclasses.fields(dataclass)
        hints = typing.get_type_hints(dataclass)
        checked: dict[str, Any] = {
            field.name: (
                Annotated[
                    hints[field.name],
                    AfterValidator(self._check(field.name)),
                    WrapValidator(functools.partial(_or_auto, field.metadata.get("auto"))),
                ],
                field.default,
            )
            for field in fields
        }
        self._model = create_model(dataclass.__name__, __base__=Group, **checked)
        self.names = {field.metadata.get("setting") or field.name: field.name for field in fields}
        """The dataclass's fields by their settings, without the kind's prefix, in lower case."""

    def read(self, values: Mapping[str, Any]) -> Any:
        """The dataclass with these values.

        Raises:
            ValidationError: Lists every value that is wrong.
        """
        return self._dataclass(**dict(self._model.model_validate(values)))

    def _check(self, name: str) -> Any:
        # Each field is checked in a separate instance, so that every wrong field is reported.
        return functools.partial(_checked, self._dataclass, name)


def _or_auto(auto: Any, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    if auto is not None and str(value).strip().lower() == "auto":
        return auto
    return read(value)


def _checked(dataclass: type[Any], name: str, value: Any) -> Any:
    checked = dataclass(**{name: value})
    if hasattr(checked, "require_libraries"):
        checked.require_libraries()
    return value

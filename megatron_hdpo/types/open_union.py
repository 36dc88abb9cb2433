"""Sections of a recipe that built-in classes describe, or a class that the recipe names.

    objective: {name: hdpo, ...}                     # a class of this package
    objective: {name: path/to/file.py:Mine, ...}     # the user's own, validated, explained and saved like the others

The recipe's classes say it by an annotation, `Annotated[Base, OpenUnion(...)]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from megatron_hdpo.types.plugins import (
    FORMS,
    LoadedReference,
    PluginError,
    entry_point_names,
    is_reference,
    load_reference,
)

ERROR = "plugin"
"""Type of the validation error of a section whose class cannot be loaded."""


class OpenUnion:
    """Annotation of a section whose class is one of `built_in`, by the value of `key`, or the one that `key` refers to.

    group: of the entry points that may stand there too. section_of: returns the class of the section for an object that
    was loaded; raises PluginError for an object that does not fit. A class that was loaded keeps its LoadedReference in
    the private attribute `_reference` of each section, and the text in `key`.
    """

    def __init__(
        self,
        built_in: tuple[type[BaseModel], ...],
        key: str,
        group: str,
        section_of: Callable[[LoadedReference], type[BaseModel]],
    ) -> None:
        self.built_in, self.key, self.group, self._section_of = built_in, key, group, section_of

    @property
    def tags(self) -> list[str]:
        """Return the values of the key that choose a built-in class."""
        return [tag for model in self.built_in for tag in _literal(model.model_fields[self.key].annotation)]

    @property
    def names(self) -> list[str]:
        """Return the values of the key that choose a class, without references: built-in ones and entry points."""
        return list(dict.fromkeys([*self.tags, *entry_point_names(self.group)]))

    def section(self, name: str) -> type[BaseModel]:
        """Return the class of the section that a reference or an entry point chooses. Raises PluginError."""
        return self._loaded(name)[1]

    def _loaded(self, name: str) -> tuple[LoadedReference, type[BaseModel]]:
        loaded = load_reference(name, self.group)
        section = self._section_of(loaded)
        for model in _sections(section):
            if model.model_config.get("extra") != "forbid" or model.model_config.get("allow_inf_nan") is not False:
                raise PluginError(
                    f"{name}: the section {model.__name__} would take unknown keys or NaN without a word: give it "
                    'model_config = ConfigDict(extra="forbid", allow_inf_nan=False)'
                )
        return loaded, section

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Return the built-in union's schema with the references before it; sections are written by their own class."""
        union = handler.generate_schema(Annotated[Union[self.built_in], Field(discriminator=self.key)])  # noqa: UP007
        written = core_schema.simple_ser_schema("any")
        return core_schema.no_info_wrap_validator_function(self._validated, union, serialization=written)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the built-in union's JSON schema, or any section whose key is a reference."""
        name = {"type": "string", "pattern": ":", "description": f"A class of your own: {FORMS}."}
        own = {"type": "object", "properties": {self.key: name}, "required": [self.key]}
        return {"anyOf": [handler(schema), own]}

    def _validated(self, value: Any, built_in: core_schema.ValidatorFunctionWrapHandler) -> Any:
        if getattr(value, "_reference", None) is not None:
            return value
        name = value.get(self.key) if isinstance(value, dict) else None
        if not isinstance(name, str) or name in self.tags or not (is_reference(name) or name in self.names):
            return built_in(value)
        try:
            loaded, section = self._loaded(name)
        except PluginError as error:
            raise PydanticCustomError(ERROR, "{reason}", {"reason": str(error)}) from error
        # A class that extends a built-in one has the literal of that one.
        literal = _literal(section.model_fields[self.key].annotation)
        keys = value | {self.key: literal[0] if literal else name}
        # The mapping puts the name into the places of errors, where a union has the value of its discriminator.
        placed: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, section])  # type: ignore[valid-type]
        made = placed.validate_python({name: keys})[name]
        made = made.model_copy(update={self.key: name})
        made._reference = loaded
        return made


def _literal(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield a section's class and those of all sections below it."""
    yield model
    for field in model.model_fields.values():
        for found in _models(field.annotation):
            if found is not model:
                yield from _sections(found)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)

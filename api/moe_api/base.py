"""Base of every typed document: camelCase on the wire, frozen in memory, closed to unknown fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Model(BaseModel):
    """A document of the API or of the wire between two of our processes.

    Python names are snake_case; JSON names are camelCase, as Kubernetes has them. Instances are frozen,
    so that a decision cannot change the context it was given.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        ser_json_timedelta="iso8601",
    )

    def to_json(self) -> dict[str, Any]:
        """The document as plain JSON values, camelCase, without fields that were left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

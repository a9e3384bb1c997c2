"""MoEDeployment v1alpha1: the one document that people write, and the only source of the CRD."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from moe_api.annotations import API_VERSION, KIND, NAME_MAX
from moe_api.fields import Rule, SpecModel, told
from moe_api.scalars import LABEL_VALUE_PATTERN, NAME_PATTERN
from moe_api.spec import MoEDeploymentSpec
from moe_api.status import MoEDeploymentStatus


class ObjectMeta(SpecModel):
    """Kubernetes metadata. What the API server adds is carried along unread."""

    name: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=253, pattern=NAME_PATTERN)] = Field(
        description="Name, unique in its namespace.",
        json_schema_extra={"x-moe-allowed": "lower-case letters, digits and '-'"},
    )
    namespace: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=63, pattern=NAME_PATTERN)] = told(
        "Namespace.", "default"
    )
    labels: dict[
        str, Annotated[str, StringConstraints(strict=True, max_length=63, pattern=f"{LABEL_VALUE_PATTERN}|^$")]
    ] = told("Labels.", {})
    annotations: dict[str, Annotated[str, StringConstraints(strict=True, max_length=262_144)]] = told(
        "Annotations.", {}
    )
    generate_name: str | None = told("Not for files: a MoEDeployment has a name.")
    uid: str | None = told("Set by the API server.")
    resource_version: str | None = told("Set by the API server.")
    generation: int | None = told("Set by the API server: rises with the spec.")
    creation_timestamp: str | None = told("Set by the API server.")
    deletion_timestamp: str | None = told("Set by the API server.")
    deletion_grace_period_seconds: int | None = told("Set by the API server.", unit="seconds")
    self_link: str | None = told("Set by the API server.")
    finalizers: tuple[str, ...] = told("Held until these are gone.", ())
    owner_references: tuple[dict[str, Any], ...] = told("Owners.", ())
    managed_fields: tuple[dict[str, Any], ...] = told("Set by the API server.", ())


class MoEDeployment(SpecModel):
    """A mixture-of-experts model, served: what is asked for and what is."""

    api_version: Literal["moestack.dev/v1alpha1"] = told("Group and version.", API_VERSION)
    kind: Literal["MoEDeployment"] = told("Kind.", KIND)
    metadata: ObjectMeta = Field(description="Kubernetes metadata.")
    spec: MoEDeploymentSpec = Field(description="What a person asks for.")
    status: MoEDeploymentStatus | None = told("What is; written by the operator and the tuner.")

    RULES = (
        Rule(
            f"size(self.metadata.name) <= {NAME_MAX}",
            f"must have at most {NAME_MAX} characters, so that names of revisions fit",
            ".metadata.name",
            lambda d: len(d.metadata.name) <= NAME_MAX,
        ),
    )

    @property
    def key(self) -> str:
        """namespace/name."""
        return f"{self.metadata.namespace}/{self.metadata.name}"

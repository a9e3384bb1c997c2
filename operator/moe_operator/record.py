"""A revision as it was born: what it was asked for and what that rendered to, kept in a ControllerRevision.

A ControllerRevision's data never changes. So a new operator, image or catalog rebuilds no running cluster, and a
revision that was deleted can be made again exactly as it was.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from moe_api.base import Model
from moe_core.config import ServingConfig


class RevisionRecord(Model):
    """What is pinned for one revision."""

    name: str
    number: int = Field(ge=1, description="order of births, and of returns: the highest is the one that is wanted")
    renderer: str = Field(description="version of the renderer that wrote it")
    spec: dict[str, Any] = Field(description="the whole spec at birth, as JSON")
    image: str = Field(description="the engine's image")
    plan: dict[str, Any] = Field(description="the plan at birth, in the form of status.plan")
    nodes_per_replica: int = Field(default=1, ge=1, description="pods of one replica")
    serving: ServingConfig = Field(description="arguments of the Serve application")
    cluster: dict[str, Any] = Field(description="spec of the RayService but serveConfigV2")


class Bounds(Model):
    """Bounds of Serve's autoscaling, in whole replicas."""

    min: int = Field(ge=0)
    max: int = Field(ge=1)

"""What is served and on what: model, hardware, parallelism, replicas."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from moe_api import fields
from moe_api.common import AbsolutePath, Count, LabelValue, Name, SecretKeyRef
from moe_api.enums import CacheKind, Quantization
from moe_api.fields import Rule, SpecModel, group, hot, revision
from moe_api.scalars import Quantity

SOURCE_PATTERN = r"^((hf|s3|gs|az|pvc|file)://)?[^\s:@?#]+$"


class ModelCache(SpecModel):
    """Where the checkpoint is kept once it is downloaded."""

    kind: CacheKind = revision(
        "Ephemeral (with the pod), Claim (a volume claim) or NodePath (a folder of the node).", CacheKind.EPHEMERAL
    )
    claim_name: Name | None = revision(
        "Volume claim, for kind Claim.", None, allowed="the name of a PersistentVolumeClaim"
    )
    path: AbsolutePath | None = revision("Folder of the node, for kind NodePath.", None, allowed="an absolute path")
    size: Quantity | None = revision(
        "Room set aside for kind Ephemeral; by default what the checkpoint needs.", None, unit="bytes"
    )

    RULES = (
        Rule(
            "self.kind != 'Claim' || has(self.claimName)",
            "is needed with kind Claim: name a PersistentVolumeClaim",
            ".claimName",
            lambda s: s.kind != CacheKind.CLAIM or s.claim_name is not None,
        ),
        Rule(
            "self.kind != 'NodePath' || has(self.path)",
            "is needed with kind NodePath: name a folder of the node",
            ".path",
            lambda s: s.kind != CacheKind.NODE_PATH or s.path is not None,
        ),
    )


class ModelSpec(SpecModel):
    """The checkpoint."""

    id: Annotated[
        str,
        StringConstraints(
            strict=True,
            min_length=1,
            max_length=128,
            pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*(/[A-Za-z0-9][-A-Za-z0-9_.]*)*$",
        ),
    ] = fields.revision(
        "Name of the model: its repository on the Hugging Face Hub, and the name that clients ask for.",
        allowed="letters, digits, '-', '_' and '.', with '/' between parts, such as Qwen/Qwen3-235B-A22B-FP8",
    )
    source: (
        Annotated[str, StringConstraints(strict=True, min_length=1, max_length=512, pattern=SOURCE_PATTERN)] | None
    ) = fields.revision(
        "Where the checkpoint lies, if not in the Hub repository of that id: another repository, a path, or an address"
        " (hf://, s3://, gs://, az://, pvc:// or file://).",
        None,
        allowed="a path, a repository, or an hf://, s3://, gs://, az://, pvc:// or file:// address without credentials",
    )
    revision: (
        Annotated[
            str, StringConstraints(strict=True, min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_./]*$")
        ]
        | None
    ) = fields.revision(
        "Commit, tag or branch of the repository; by default its main branch. Name a commit to keep the same weights.",
        None,
        allowed="a commit, tag or branch",
    )
    quantization: Quantization = fields.revision(
        "Form of the weights; Auto reads it from the checkpoint.", Quantization.AUTO
    )
    token_secret_ref: SecretKeyRef | None = group("Secret with the token that downloads the checkpoint.", None)
    cache: ModelCache = group("Where the checkpoint is kept once it is downloaded.", ModelCache())


class HardwareSpec(SpecModel):
    """What one replica runs on."""

    accelerator: LabelValue = revision(
        "Accelerator by its catalog name, such as nvidia-h100; cpu runs ranks on processor cores.",
        allowed="a catalog name such as nvidia-h100, or cpu",
    )
    gpus_per_replica: Annotated[int, Field(strict=True, ge=1, le=1024)] = revision(
        "GPUs of one replica, over all its ranks; on cpu, its ranks.", 1, unit="GPUs"
    )


class ParallelismSpec(SpecModel):
    """How one replica is cut into ranks. What is left out is chosen by the planner."""

    tensor: Count | None = revision("Tensor parallel size.", None, unit="ranks", le=64)
    data: Count | None = revision(
        "Data parallel size: ranks with their own attention and their own requests.", None, unit="ranks", le=1024
    )
    expert: Count | None = revision(
        "Expert parallel size: tensor × data, or 1 to keep every expert on every rank.", None, unit="ranks", le=1024
    )
    pipeline: Count | None = revision("Pipeline parallel size.", None, unit="ranks", le=64)

    RULES = (
        Rule(
            "!has(self.expert) || self.expert == 1 || !has(self.tensor) || !has(self.data)"
            " || self.expert == self.tensor * self.data",
            "must be tensor × data, or 1",
            ".expert",
            lambda s: None in (s.expert, s.tensor, s.data) or s.expert in (1, s.tensor * s.data),
        ),
    )


class ReplicasSpec(SpecModel):
    """How many replicas autoscaling may run."""

    min: Annotated[int, Field(strict=True, ge=0, le=1000)] = hot(
        "Fewest replicas; 0 needs a fallback target.", 1, unit="replicas"
    )
    max: Count | None = hot(
        "Most replicas; by default min (at least 1), so that nothing scales.", None, unit="replicas", le=1000
    )

    RULES = (
        Rule(
            "!has(self.max) || self.max >= self.min",
            "must be at least replicas.min",
            ".max",
            lambda s: s.max is None or s.max >= s.min,
        ),
    )

    @property
    def ceiling(self) -> int:
        """Most replicas, with the default filled in."""
        return max(self.min, 1) if self.max is None else self.max

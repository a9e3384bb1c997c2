"""Pieces that several groups of the resource share: bounded strings, counts, references to Secrets."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import Field, StringConstraints

from moe_api.fields import MapOf, SpecModel, revision
from moe_api.scalars import LABEL_VALUE_PATTERN, NAME_PATTERN, QUALIFIED_NAME_PATTERN, Between, Duration, Exact

Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=63, pattern=NAME_PATTERN)]
"""A DNS label."""
Subdomain = Annotated[
    str, StringConstraints(strict=True, min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
]
LabelValue = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=63, pattern=LABEL_VALUE_PATTERN)]
Text = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=512)]
Url = Annotated[
    str, StringConstraints(strict=True, min_length=8, max_length=512, pattern=r"^https?://[^\s@/?#]+(/[^\s?#@]*)?$")
]
"""An http or https address without user, query or fragment: credentials belong in Secrets."""
AbsolutePath = Annotated[str, StringConstraints(strict=True, min_length=2, max_length=512, pattern=r"^/[^\x00]*$")]
QUALIFIED_NAME = "a name such as app or example.com/app"
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=2_147_483_647)]
Natural = Annotated[int, Field(strict=True, ge=0, le=2_147_483_647)]

Share = Annotated[Decimal, Exact("0", "1")]
"""A fraction of a whole: "0.05" is 5 %."""
Usd = Annotated[Decimal, Exact("0", "1000000000")]
CapacityFactor = Annotated[Decimal, Exact("0", "1024", above=True)]
"""γ: slots of an expert in a step over the mean demand."""
Latency = Annotated[Duration, Between("1ms", "1h")]
Interval = Annotated[Duration, Between("1s", "168h")]
ExpertsPerToken = Annotated[int, Field(strict=True, ge=1, le=1024)]

Labels = Annotated[
    dict[str, Annotated[str, StringConstraints(strict=True, max_length=63)]],
    MapOf(32, QUALIFIED_NAME_PATTERN, 316, QUALIFIED_NAME),
]
Annotations = Annotated[
    dict[str, Annotated[str, StringConstraints(strict=True, max_length=4096)]],
    MapOf(32, QUALIFIED_NAME_PATTERN, 316, QUALIFIED_NAME),
]


class SecretKeyRef(SpecModel):
    """A key of a Secret in the resource's namespace. The operator never reads it: pods mount it."""

    name: Subdomain = revision("Name of the Secret.", allowed="lower-case letters, digits, '-' and '.'")
    key: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")] = (
        revision("Key inside the Secret.", allowed="letters, digits, '-', '_' and '.'")
    )

"""What every API server answers: cases that the in-memory one and the real one both pass.

A case is an async function of a `Server`. `CASES` holds them by name; a test module runs them on its own server.
"""

from __future__ import annotations

from tests.kube import conformance_apply, conformance_forms, conformance_objects, conformance_reads
from tests.kube.server import CASES, Case, Server

PARTS = (conformance_objects, conformance_apply, conformance_forms, conformance_reads)

__all__ = ["CASES", "PARTS", "Case", "Server"]

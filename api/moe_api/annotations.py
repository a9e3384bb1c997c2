"""Names of annotations, labels and field managers: what commands write so that GitOps does not undo it."""

GROUP = "moestack.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "MoEDeployment"
PLURAL = "moedeployments"

PINS = f"{GROUP}/pins"
"""JSON object of knob name → value, written by `moectl tune pin`; the same knobs as spec.tuning.pins, and it wins."""
PAUSED = f"{GROUP}/paused"
""""true", or an RFC 3339 time until which the tuner holds every knob; written by `moectl tune pause`."""
PAUSE_REASON = f"{GROUP}/pause-reason"
RENDERER = f"{GROUP}/renderer-version"
"""On what a revision renders to: the version of the renderer that wrote it."""
REVISION_LABEL = f"{GROUP}/revision"
DEPLOYMENT_LABEL = f"{GROUP}/deployment"

OPERATOR_MANAGER = "moestack-operator"
TUNER_MANAGER = "moestack-tuner"
CLI_MANAGER = "moectl"
"""Field managers of server-side apply, one for each writer."""

MANAGED_SELECTOR = f"app.kubernetes.io/managed-by={OPERATOR_MANAGER}"
"""Finds what the operator made, and the EndpointSlices of its Services, which repeat their labels."""

NAME_MAX = 36
"""A RayService name holds 47 characters: this one, '-' and ten of a hash."""

"""The gateway of one MoEDeployment: who may ask, from where, and how many pods answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moe_api.common import Annotations, Flag, SecretKeyRef, Subdomain, Text, Url
from moe_api.enums import AuthMode, BudgetStoreKind, ExposureKind, SessionKey
from moe_api.fields import Disruption, ListOf, Rule, SpecModel, group, hot


class GatewayAuth(SpecModel):
    """How the gateway knows its tenants."""

    mode: AuthMode = hot('"None", APIKeys (a Secret of keys) or OIDC (signed tokens).', AuthMode.NONE)
    secret_name: Subdomain | None = hot(
        "Secret with one entry a tenant, for APIKeys: its name the tenant, its value the key.",
        None,
        allowed="the name of a Secret",
    )
    issuer: Url | None = hot("Issuer of tokens, for OIDC.", None, allowed="an https address")
    audience: Text | None = hot("Audience that a token must carry, for OIDC.", None)
    tenant_claim: Text = hot("Claim of the token that names the tenant, for OIDC.", "sub")

    RULES = (
        Rule(
            "self.mode != 'APIKeys' || has(self.secretName)",
            "is needed with mode APIKeys: name the Secret that holds the keys",
            ".secretName",
            lambda s: s.mode != AuthMode.API_KEYS or s.secret_name is not None,
        ),
        Rule(
            "self.mode != 'OIDC' || has(self.issuer)",
            "is needed with mode OIDC: the address of the issuer",
            ".issuer",
            lambda s: s.mode != AuthMode.OIDC or s.issuer is not None,
        ),
        Rule(
            "self.mode != 'OIDC' || has(self.audience)",
            "is needed with mode OIDC: the audience that a token must carry",
            ".audience",
            lambda s: s.mode != AuthMode.OIDC or s.audience is not None,
        ),
    )


class GatewayExposure(SpecModel):
    """How clients reach the gateway."""

    kind: ExposureKind = hot(
        "ClusterIP (inside the cluster), LoadBalancer, Ingress or HTTPRoute.", ExposureKind.CLUSTER_IP
    )
    host: Subdomain | None = hot("Host name, for Ingress and HTTPRoute.", None, allowed="a host name")
    class_name: Subdomain | None = hot(
        "Ingress class, or the Gateway that an HTTPRoute joins.", None, allowed="a resource name"
    )
    tls_secret_name: Subdomain | None = hot(
        "Secret with the certificate, for Ingress.", None, allowed="the name of a Secret"
    )
    annotations: Annotations = hot("Annotations of the Service, Ingress or HTTPRoute.", {})

    RULES = (
        Rule(
            "!(self.kind in ['Ingress', 'HTTPRoute']) || has(self.host)",
            "is needed with Ingress and HTTPRoute: the host name that clients use",
            ".host",
            lambda s: s.kind not in (ExposureKind.INGRESS, ExposureKind.HTTP_ROUTE) or s.host is not None,
        ),
    )


class GatewayReplicas(SpecModel):
    """Bounds of the gateway's own autoscaling."""

    min: Annotated[int, Field(strict=True, ge=1, le=100)] = hot("Fewest pods.", 2, unit="pods")
    max: Annotated[int, Field(strict=True, ge=1, le=100)] = hot("Most pods.", 10, unit="pods")

    RULES = (Rule("self.min <= self.max", "must be at least gateway.replicas.min", ".max", lambda s: s.min <= s.max),)


class BudgetStore(SpecModel):
    """What keeps the fallback budget between gateway pods."""

    kind: BudgetStoreKind = hot(
        "Object (of Kubernetes), PostgreSQL, Valkey, or SQLite on one host.", BudgetStoreKind.OBJECT
    )
    url_secret_ref: SecretKeyRef | None = group(
        "Secret with the store's address, for PostgreSQL and Valkey.", None, disruption=Disruption.HOT
    )

    RULES = (
        Rule(
            "!(self.kind in ['PostgreSQL', 'Valkey']) || has(self.urlSecretRef)",
            "is needed with PostgreSQL and Valkey: name and key of the Secret with its address",
            ".urlSecretRef",
            lambda s: (
                s.kind not in (BudgetStoreKind.POSTGRESQL, BudgetStoreKind.VALKEY) or s.url_secret_ref is not None
            ),
        ),
    )


class GatewaySessions(SpecModel):
    """Which requests belong together."""

    by: Annotated[tuple[SessionKey, ...], ListOf(4, unique=True)] = hot(
        "What tells a session, the first that a request has: Header (x-moestack-session), PromptCacheKey, User,"
        " PromptHead (everything up to the first message of the user); none: no request belongs to another.",
        (),
    )


class GatewaySpec(SpecModel):
    """The proxy in front of the engine and the closed APIs."""

    auth: GatewayAuth = group("How the gateway knows its tenants.", GatewayAuth())
    exposure: GatewayExposure = group("How clients reach the gateway.", GatewayExposure())
    replicas: GatewayReplicas = group("Bounds of the gateway's own autoscaling.", GatewayReplicas())
    workers: Annotated[int, Field(strict=True, ge=1, le=64)] = hot(
        "Processes of a pod, which share its port; each takes a CPU.", 1, unit="processes"
    )
    siblings_secret_ref: SecretKeyRef | None = group(
        "Secret with a text that signs what pods tell one another; by default the network policy keeps others out.",
        None,
        disruption=Disruption.HOT,
    )
    budget_store: BudgetStore = group("What keeps the fallback budget between gateway pods.", BudgetStore())
    sessions: GatewaySessions = group(
        "Which requests are kept at one revision, as far as the weights between revisions allow.", GatewaySessions()
    )
    record_decisions: Flag = hot(
        "Each pod writes down its decisions and what they came from, for moectl replay: no prompt, at most 32 MiB.",
        False,
    )

    RULES = (
        Rule(
            "self.exposure.kind == 'ClusterIP' || self.auth.mode != 'None'",
            "must be APIKeys or OIDC where the gateway is reached from outside the cluster",
            ".auth.mode",
            lambda s: s.exposure.kind == ExposureKind.CLUSTER_IP or s.auth.mode != AuthMode.NONE,
        ),
        Rule(
            "self.budgetStore.kind != 'SQLite' || self.replicas.max == 1",
            "SQLite serves one host: set gateway.replicas to 1, or choose Object, PostgreSQL or Valkey",
            ".budgetStore.kind",
            lambda s: s.budget_store.kind != BudgetStoreKind.SQLITE or s.replicas.max == 1,
        ),
    )

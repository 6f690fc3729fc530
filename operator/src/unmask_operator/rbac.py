"""The least permissions that the operator needs, made from what its reconcilers say they own and read."""

from collections.abc import Sequence

from unmask_operator.decision import JsonObject, Reconciler
from unmask_operator.resources import DEPLOYMENT, EVENT, LEASE, MANAGER, RESOURCES, WARNINGS, Resource

__all__ = [
    "SYSTEM_NAMESPACE",
    "USER",
    "lease_rules",
    "manifests",
    "rules",
    "rules_for_people",
    "user_role",
]

SYSTEM_NAMESPACE = "unmask-system"
"""Where the operator itself is installed by the manifests."""

USER = "unmask-user"
"""The role of people who submit jobs and services and follow them."""

_LABELS = {"app.kubernetes.io/name": MANAGER, "app.kubernetes.io/part-of": "unmask"}


def rules(reconcilers: Sequence[Reconciler]) -> list[JsonObject]:
    """Return the rules of a Role (or ClusterRole) for all objects but the Lease.

    No secrets, no exec, no wildcard: nothing that a reconciler does not name.
    """
    verbs: dict[tuple[str, str], set[str]] = {}

    def allow(resource: Resource, *new: str, subresource: str = "") -> None:
        plural = resource.plural + (f"/{subresource}" if subresource else "")
        verbs.setdefault((resource.group, plural), set()).update(new)

    for reconciler in reconcilers:
        own = RESOURCES[reconciler.kind]
        allow(own, "list", "watch", *(["delete"] if reconciler.expires else []))
        allow(own, "patch", subresource="status")
        # Asked for by clusters that protect owners against being held up by what they own.
        allow(own, "update", subresource="finalizers")
        for kind in (*reconciler.owns, *reconciler.optional):
            allow(RESOURCES[kind], "create", "delete", "get", "list", "patch", "watch")
        for kind in (*reconciler.reads, *filter(None, [reconciler.refers_to])):
            allow(WARNINGS[kind] if kind in WARNINGS else RESOURCES[kind], "list", "watch")
    allow(EVENT, "create", "patch")
    return [
        {"apiGroups": [group], "resources": [plural], "verbs": sorted(allowed)}
        for (group, plural), allowed in sorted(verbs.items())
    ]


def lease_rules(name: str = MANAGER) -> list[JsonObject]:
    """Return the rules of the Role for the Lease called ``name``, in the operator's own namespace.

    Its Deployment has the same name, and owns it.
    """
    where: JsonObject = {"apiGroups": [LEASE.group], "resources": [LEASE.plural]}
    return [
        {**where, "verbs": ["create"]},  # a name cannot be asked for here
        {**where, "resourceNames": [name], "verbs": ["get", "update"]},
        {
            "apiGroups": [DEPLOYMENT.group],
            "resources": [DEPLOYMENT.plural],
            "resourceNames": [name],
            "verbs": ["get"],
        },
    ]


def rules_for_people(*, edit: bool) -> list[JsonObject]:
    """Return what people need for the custom resources: to look at them, or to ``edit`` them too."""
    own = [resource for resource in RESOURCES.values() if resource.custom]
    verbs = ["get", "list", "watch"]
    if edit:
        verbs = sorted([*verbs, "create", "delete", "deletecollection", "patch", "update"])
    found: list[JsonObject] = []
    for resource in own:
        where: JsonObject = {"apiGroups": [resource.group]}
        scale = ["get", "patch", "update"] if edit else ["get"]
        found += [
            {**where, "resources": [resource.plural], "verbs": verbs},
            {**where, "resources": [f"{resource.plural}/scale"], "verbs": scale},
            {**where, "resources": [f"{resource.plural}/status"], "verbs": ["get"]},
        ]
    return found


def user_role() -> JsonObject:
    """Return the ClusterRole of people: what the commands ``unmask submit`` to ``unmask cancel`` ask.

    Who has the role edit in a namespace has all this where the operator was installed by its chart.
    """
    own = [resource for resource in RESOURCES.values() if resource.custom]
    pods = RESOURCES["Pod"]

    def rule(group: str, names: list[str], *verbs: str) -> JsonObject:
        return {"apiGroups": [group], "resources": names, "verbs": sorted(verbs)}

    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": USER, "labels": dict(_LABELS)},
        "rules": [
            rule(pods.group, [pods.plural], "get", "list"),
            rule(pods.group, [f"{pods.plural}/log"], "get"),
            rule(EVENT.group, [EVENT.plural], "list"),
            *(
                rule(one.group, [one.plural], "create", "delete", "get", "list", "patch", "watch")
                for one in own
            ),
        ],
    }


def manifests(reconcilers: Sequence[Reconciler], namespace: str | None) -> list[JsonObject]:
    """Return the account, roles and bindings; for one namespace, or for all of them where it is ``None``."""
    account = {"kind": "ServiceAccount", "name": MANAGER, "namespace": SYSTEM_NAMESPACE}

    def thing(api: str, kind: str, name: str, place: str | None, **rest: object) -> JsonObject:
        metadata = {"name": name} | ({"namespace": place} if place else {}) | {"labels": dict(_LABELS)}
        return {"apiVersion": api, "kind": kind, "metadata": metadata, **rest}

    def granted(role: str, name: str, place: str | None, allowed: list[JsonObject]) -> list[JsonObject]:
        group = "rbac.authorization.k8s.io"
        reference = {"apiGroup": group, "kind": role, "name": name}
        return [
            thing(f"{group}/v1", role, name, place, rules=allowed),
            thing(f"{group}/v1", f"{role}Binding", name, place, roleRef=reference, subjects=[dict(account)]),
        ]

    return [
        thing("v1", "ServiceAccount", MANAGER, SYSTEM_NAMESPACE, automountServiceAccountToken=False),
        *granted("Role" if namespace else "ClusterRole", MANAGER, namespace, rules(reconcilers)),
        *granted("Role", f"{MANAGER}-lease", SYSTEM_NAMESPACE, lease_rules()),
    ]

"""The kinds of objects that the operator knows, and where the API server keeps them."""

from dataclasses import dataclass

from unmask_api import base, crd

__all__ = ["DEPLOYMENT", "EVENT", "LEASE", "MANAGED_BY", "MANAGER", "RESOURCES", "WARNINGS", "Resource"]

MANAGER = "unmask-operator"
"""The one field manager, the value of the label below, and the name that events report."""
MANAGED_BY = "app.kubernetes.io/managed-by"
"""The label by which the operator finds what it made."""


@dataclass(frozen=True)
class Resource:
    """A kind, with the names that its path is made of."""

    kind: str
    """Singular, in camel case, such as ``Job``."""
    group: str
    """API group; empty for the oldest kinds, such as ``Pod``."""
    version: str
    """Version of the group, such as ``v1``."""
    plural: str
    """What stands in the path, such as ``jobs``."""
    custom: bool = False
    """Whether it is one of our own kinds."""
    fields: str = ""
    """Field selector, where only some of the objects are looked at, and nobody's label is on them."""

    @property
    def api_version(self) -> str:
        """Return what objects of the kind carry as ``apiVersion``."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """Return the path below the API server's address; without a namespace, that of all namespaces."""
        parts = ["/apis", self.group, self.version] if self.group else ["/api", self.version]
        if namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


LEASE = Resource("Lease", "coordination.k8s.io", "v1", "leases")
DEPLOYMENT = Resource("Deployment", "apps", "v1", "deployments")
EVENT = Resource("Event", "events.k8s.io", "v1", "events")

RESOURCES = {
    resource.kind: resource
    for resource in (
        *(
            Resource(own.model.__name__, base.GROUP, own.version, own.plural, custom=True)
            for own in crd.RESOURCES
        ),
        Resource("ConfigMap", "", "v1", "configmaps"),
        Resource("Pod", "", "v1", "pods"),
        Resource("Service", "", "v1", "services"),
        Resource("Job", "batch", "v1", "jobs"),
        Resource("PodGroup", "scheduling.k8s.io", "v1beta1", "podgroups"),
        Resource("StatefulSet", "apps", "v1", "statefulsets"),
        Resource("ControllerRevision", "apps", "v1", "controllerrevisions"),
        Resource("PodDisruptionBudget", "policy", "v1", "poddisruptionbudgets"),
        Resource("HorizontalPodAutoscaler", "autoscaling", "v2", "horizontalpodautoscalers"),
        Resource("NetworkPolicy", "networking.k8s.io", "v1", "networkpolicies"),
        Resource("EndpointSlice", "discovery.k8s.io", "v1", "endpointslices"),
    )
}
"""Kind -> where it is, for every kind that a reconciler may own or read."""

WARNINGS = {
    name: Resource("Event", EVENT.group, EVENT.version, EVENT.plural, fields=fields)
    for name, fields in (
        ("JobWarning", "regarding.kind=Job,reason=FailedCreate"),
        ("StatefulSetWarning", "regarding.kind=StatefulSet,reason=FailedCreate"),
        ("PodWarning", "regarding.kind=Pod,reason=FailedMount"),
    )
}
"""Name -> events that a reconciler may read: what the cluster says in them and nowhere else.

``JobWarning``, ``StatefulSetWarning``: a pod was refused, by a quota or for want of its service account.
``PodWarning``: a volume cannot be mounted, for want of its Secret or ConfigMap.
"""

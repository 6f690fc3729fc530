"""Services on a cluster: submit, get, list, wait, logs, cancel, delete.

Everything here may be done twice: submitting the same manifest again changes nothing, and so on. So a
request whose answer was lost is simply sent again.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask_api.inference_service import DiffusionInferenceService
from unmask_operator.client import service_logs
from unmask_operator.client.custom_objects import CustomObjects
from unmask_operator.client.logs import PodLine
from unmask_operator.client.manifests import admitted, as_written
from unmask_operator.client.service_logs import Choice
from unmask_operator.client.service_view import InferenceService
from unmask_operator.decision import JsonObject
from unmask_operator.launch.admission import admit_service, read_service
from unmask_operator.resources import RESOURCES

__all__ = ["InferenceServices", "ServiceManifest"]

ServiceManifest = Path | str | Mapping[str, Any] | DiffusionInferenceService
"""A manifest: its path, or what it holds."""


class InferenceServices(CustomObjects[InferenceService]):
    """The services of a namespace.

    >>> from unmask_operator.client import InferenceServices
    >>> services = InferenceServices.connect(namespace="ml")  # doctest: +SKIP
    >>> services.wait(services.submit("service.yaml").name).state  # doctest: +SKIP
    <ServiceState.READY: 'Ready'>

    Every method raises :class:`~unmask_operator.client.errors.ClusterError`, or one of its kinds, where the
    cluster cannot be asked or says no.
    """

    resource = RESOURCES["DiffusionInferenceService"]
    view = InferenceService
    several = "services"

    def submit(
        self, manifest: ServiceManifest, *, force: bool = False, dry_run: bool = False
    ) -> InferenceService:
        """Make the service of a manifest, or let the one that is there become it, and return it.

        A manifest is the whole of what its owner asks for (server-side apply): what it names is set, what it
        no longer names goes back to its default, and what others have set and it does not name, such as an
        autoscaler's ``replicas``, stays. A service that was cancelled starts again. A namespace in the
        manifest must be the one chosen, if one was.

        Args:
            manifest: path of a file, text, or object.
            force: take over fields that others have set to something else.
            dry_run: have the cluster check it and keep nothing.

        Raises:
            UsageError: The manifest is wrong.
            Conflicting: Others have set fields of the manifest to something else.
            Refused: The cluster finds the manifest, or the change, wrong.
        """
        service = admitted(manifest, DiffusionInferenceService, read=read_service, admit=admit_service)
        metadata, spec = service.metadata, service.spec
        namespace = self._namespace_of(metadata)
        body = as_written(service)
        body["metadata"]["namespace"] = namespace
        if not spec.stopped:
            # Nobody's while it runs, so that who stops it meanwhile is in nobody's way.
            body["spec"].pop("stopped", None)
        made = InferenceService(
            self._connection.apply(
                self.resource,
                namespace,
                metadata.name,
                body,
                what=f"submit service {metadata.name}",
                force=force,
                dry_run=dry_run,
            )
        )
        starts = made.cancelled or "stopped" in spec.model_fields_set
        if made.raw["spec"].get("stopped") and starts and not spec.stopped and not dry_run:
            return self._let_go_on(made, dry_run=False)
        return made

    def logs(
        self,
        name: str,
        choice: Choice | None = None,
        *,
        follow: bool = False,
        since: datetime.datetime | None = None,
        tail: int | None = None,
        poll: float = 2.0,
    ) -> Iterator[PodLine]:
        """Yield what the service's pods print.

        Args:
            name: which service.
            choice: whose lines; by default those of all engines.
            follow: wait for more, through rollouts, until the service is deleted.
            since: leave out what was written before.
            tail: only so many of the last lines of each pod.
            poll: seconds between two looks at what pods there are.

        Raises:
            NotFound: There is no such service, or no pod to read from.
        """
        first = self.get(name)
        return service_logs.group_lines(
            self._connection,
            lambda: self._last_known(first),
            choice or Choice(),
            follow=follow,
            since=since,
            tail=tail,
            poll=poll,
        )

    def cancel(self, name: str, *, dry_run: bool = False) -> InferenceService:
        """Stop a service: its engines finish what runs and end, and the service stays.

        Submitting its manifest again starts it.
        """
        service = self.get(name)
        if service.raw["spec"].get("stopped"):
            return service
        return self._cancel(service, dry_run=dry_run)

    def pods(self, one: InferenceService) -> Sequence[JsonObject]:
        """Return the service's pods, ordered by group, as the API server keeps them."""
        return service_logs.pods_of(self._connection, one)

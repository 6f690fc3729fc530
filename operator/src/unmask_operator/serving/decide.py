"""What should be for a DiffusionInferenceService, given what is.

In each pass, from what there is alone:

1. What a service has once is applied: addresses, the budget for disruptions, the autoscaler, who may connect.
2. The model is looked up, and the spec becomes a revision, which is kept. While there is no model, or no
   image, the revision that was rolled out last goes on being what groups are made of.
3. Groups that end are taken down in their order: the engine drains, then its shards go, then their names.
4. The plan says which groups to make and which to begin to end, within the budget.
5. Groups that stay are mended: what somebody deleted of them is made again, what was changed is changed back.
"""

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from unmask.errors import UsageError
from unmask_api.inference_service import DiffusionInferenceService
from unmask_operator.conditions import Conditions
from unmask_operator.decision import Decision, Event, JsonObject, Observed, Reconciler
from unmask_operator.launch import fronts
from unmask_operator.launch.groups import GroupOf, group_objects
from unmask_operator.serving import revisions
from unmask_operator.serving.model import Resolved, resolve
from unmask_operator.serving.observing import Found, find_groups
from unmask_operator.serving.passes import Pass, Settings
from unmask_operator.serving.planning import GroupKey, Plan, Wish, plan
from unmask_operator.serving.revisions import Revision
from unmask_operator.serving.telling import tell
from unmask_operator.times import stamp

__all__ = ["decide", "reconciler"]

KIND = "DiffusionInferenceService"


def reconciler(settings: Settings) -> Reconciler:
    """Return the reconciler of services."""
    return Reconciler(
        kind=KIND,
        owns=(
            "ControllerRevision",
            "Service",
            "StatefulSet",
            "PodDisruptionBudget",
            "HorizontalPodAutoscaler",
            "NetworkPolicy",
        ),
        decide=lambda observed: decide(observed, settings),
        reads=("Pod", "EndpointSlice", "StatefulSetWarning", "PodWarning"),
        refers=_refers,
        refers_to="DiffusionTrainJob",
    )


def decide(observed: Observed, settings: Settings) -> Decision:
    """Return what should be; see the rules above."""
    if observed.resource["metadata"].get("deletionTimestamp"):
        return Decision()  # the garbage collector takes what it owns
    try:
        service = _service(observed.resource)
    except ValidationError as error:
        return _unreadable(observed, error)
    turn = Pass(observed, service)
    turn.conditions.set("Stalled", "False", "Following")
    _front(turn)
    resolved = _model(turn)
    kept = revisions.stored(turn.children("ControllerRevision"))
    asked = _asked(turn, settings, resolved)
    if asked is not None:
        kept.setdefault(asked.name, asked)
    wish = _wish(turn, asked, kept)
    groups = find_groups(
        observed.children,
        service.metadata.name,
        min_ready_seconds=service.spec.rollout.min_ready_seconds,
        now=turn.now,
    )
    next_steps = plan([one.seen for one in groups], wish) if wish else Plan()
    if wish:
        try:
            _groups(turn, groups, next_steps, kept)
        except UsageError as error:
            turn.obstacle("InvalidSpec", str(error))
    _keep_revisions(turn, asked, groups, wish)
    _say_what_is_in_the_way(turn)
    tell(turn, groups, wish, next_steps, asked=asked, resolved=resolved)
    return turn.result()


def _refers(resource: JsonObject) -> Sequence[str]:
    """Return the name of the job that the model comes from, if it does."""
    source = resource["spec"].get("model", {}).get("job") or {}
    return [source["name"]] if "name" in source else []


def _service(resource: JsonObject) -> DiffusionInferenceService:
    metadata = {key: resource["metadata"][key] for key in ("name", "namespace")}
    document = {key: resource[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": metadata}
    return DiffusionInferenceService.model_validate(document, by_alias=True, strict=False)


def _unreadable(observed: Observed, error: ValidationError) -> Decision:
    """Leave everything as it is: another version of the operator may have made sense of it."""
    first = error.errors()[0]
    text = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}; change it"
    metadata, before = observed.resource["metadata"], observed.resource.get("status") or {}
    generation = metadata.get("generation", 0)
    conditions = Conditions(before.get("conditions", ()), generation=generation, now=stamp(observed.now))
    conditions.set("Stalled", "True", "InvalidSpec", text)
    conditions.set("Ready", "False", "InvalidSpec", text)
    status = dict(before) | {"observedGeneration": generation, "state": "Stalled"}
    status["conditions"] = conditions.to_json()
    return Decision(status=status, events=(Event("InvalidSpec", text[:1024], "Warning"),))


def _front(turn: Pass) -> None:
    """Apply what a service has once."""
    service = turn.service
    turn.apply += [
        fronts.public_service(service),
        fronts.engines_service(service),
        fronts.disruption_budget(service),
        *(policies := fronts.network_policies(service)),
    ]
    wanted = {one["metadata"]["name"] for one in policies}
    for one in turn.children("NetworkPolicy"):
        if one["metadata"]["name"] not in wanted:
            turn.remove(one)
    if service.spec.autoscaling and not service.spec.stopped:
        turn.apply.append(fronts.autoscaler(service, service.spec.autoscaling))
    else:  # a stopped service has nothing to count, and says so itself
        for one in turn.children("HorizontalPodAutoscaler"):
            turn.remove(one)


def _model(turn: Pass) -> Resolved:
    """Look the model up, and keep in the status what was found."""
    source = turn.service.spec.model
    job = turn.observed.referred.get(source.job.name) if source.job else None
    resolved = resolve(source, job, turn.status.get("model"))
    turn.status["model"] = resolved.model.to_json_dict() if resolved.model else None
    turn.conditions.set(
        "ModelReady", "True" if resolved.ready else "False", resolved.reason, resolved.message
    )
    if resolved.reason in ("JobMissing", "NotComing"):
        missing = resolved.reason == "JobMissing"
        turn.obstacle("ModelJobMissing" if missing else "ModelJobFailed", resolved.message)
    return resolved


def _asked(turn: Pass, settings: Settings, resolved: Resolved) -> Revision | None:
    """Return the revision that the manifest asks for; ``None`` while something of it is not known."""
    image = turn.service.spec.image or settings.image
    if image is None:
        turn.obstacle("InvalidSpec", "spec.image is missing, and the operator has no default: set it")
        return None
    if resolved.model is None:
        return None
    return revisions.of_spec(turn.service.spec, image=image, model=resolved.model)


def _wish(turn: Pass, asked: Revision | None, kept: Mapping[str, Revision]) -> Wish | None:
    """Return what there should be in the end; ``None`` where there is nothing to make groups of."""
    current = turn.status.get("currentRevision")
    if current not in kept:  # at first, or somebody deleted it
        current = asked.name if asked else None
    target = asked.name if asked else current
    if target is None or current is None:
        return None
    rollout = turn.service.spec.rollout
    turn.status["currentRevision"] = current
    return Wish(
        replicas=turn.replicas,
        target=target,
        current=current,
        surge=rollout.max_surge,
        unavailable=rollout.max_unavailable,
        partition=rollout.partition,
        paused=rollout.paused,
    )


def _groups(turn: Pass, groups: Sequence[Found], steps: Plan, kept: Mapping[str, Revision]) -> None:
    """Make, mend and end groups."""
    # One at a time: however far this pass is carried out, the next ones then go the same way.
    leaving = set(steps.remove[:1])
    making = steps.create[:1] if not leaving else ()
    for group in groups:
        key = group.seen.key
        if group.state == "Ending":
            _end(turn, group)
        elif key in leaving:
            turn.tell("RemovingGroup", f"{group.name} drains and is removed")
            turn.remove(group.sets["engine"], "Foreground")
        elif group.revision in kept:
            _mend(turn, group, kept[group.revision])
    for ordinal, revision in making:
        made = _objects(turn, (ordinal, revision), kept[revision])
        turn.apply += made
        if not turn.observed.conflicts and not turn.observed.rejections:
            turn.tell("MakingGroup", made[0]["metadata"]["name"])
    _clear_names(turn, groups, making)


def _objects(turn: Pass, key: GroupKey, revision: Revision) -> list[JsonObject]:
    group = GroupOf(
        service=turn.service.metadata.name,
        namespace=str(turn.service.metadata.namespace),
        ordinal=key[0],
        revision=key[1],
        spec=revision.spec,
    )
    return group_objects(group)


def _end(turn: Pass, group: Found) -> None:
    """Let the shards go once the engine is gone: till then it has requests to finish."""
    if "engine" not in group.sets and "shard" in group.sets:
        turn.remove(group.sets["shard"], "Foreground")


def _mend(turn: Pass, group: Found, revision: Revision) -> None:
    """Make what is missing of a group, and change back what somebody has changed."""
    for one in _objects(turn, group.seen.key, revision):
        there = turn.find(one["kind"], one["metadata"]["name"])
        (turn.apply if there is None else turn.restore).append(one)


def _clear_names(turn: Pass, groups: Sequence[Found], making: Sequence[GroupKey]) -> None:
    """Delete the Services of groups of which nothing else is left."""
    names = {group.name for group in groups}
    names |= {f"{turn.service.metadata.name}-{ordinal}-{revision}" for ordinal, revision in making}
    front = turn.service.metadata.name
    names |= {front, f"{front}-engines"}
    for one in turn.children("Service"):
        if one["metadata"]["name"] not in names:
            turn.remove(one)


def _keep_revisions(turn: Pass, asked: Revision | None, groups: Sequence[Found], wish: Wish | None) -> None:
    """Keep the revision that is asked for, before anything is made of it, and let go of old ones."""
    name, there = turn.service.metadata.name, turn.children("ControllerRevision")
    if asked and asked.name not in map(revisions.name_of, there):
        number = 1 + max((int(one.get("revision", 0)) for one in there), default=0)
        turn.apply.insert(0, revisions.controller_revision(name, asked, number))
    used = {group.revision for group in groups} | ({wish.target, wish.current} if wish else set())
    for one in revisions.outdated(there, used, turn.service.spec.rollout.revision_history_limit):
        turn.remove(one)


def _say_what_is_in_the_way(turn: Pass) -> None:
    for kind, name in sorted(turn.observed.conflicts):
        turn.obstacle(
            "NameConflict",
            f"{kind} {name} belongs to somebody else: delete it, or give the service another name",
        )
        return
    for (kind, name), message in sorted(turn.observed.rejections.items()):
        turn.obstacle("Refused", f"{kind} {name} is refused by the API server: {message}")
        return

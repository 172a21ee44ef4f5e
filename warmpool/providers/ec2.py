"""Machines held in the warm pools of EC2 Auto Scaling groups, one group a class.

What is held is the warm pool's size, which the group has and we only change: its least and its most are set
to the same number, which is what makes the size absolute. EC2 launches, stops or hibernates, and replaces.
The group hands over by its desired capacity: whoever raises it (`serve`, where nobody else does) gets
instances of the warm pool first.

An instance is kept from being stopped too early, and from service, by a launching lifecycle hook: it waits in
Warmed:Pending:Wait until it is warm, and `admit` completes the action. On its way into service the same hook
holds it again (Pending:Wait); it reports as handed and not admitted, and whoever drives this provider admits
it at once. (Faster: user data that completes the action itself when the target lifecycle state is InService.)

One thread. boto3's own retries are few, because the controller comes again anyway. Spec: the service model of
Amazon EC2 Auto Scaling, 2011-01-01, and of EC2.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import boto3
import botocore.client
import botocore.exceptions

from warmpool import errors
from warmpool.provider import HELD, Machine, Stage
from warmpool.settings import Ec2Class, Ec2Provider

if TYPE_CHECKING:
    from mypy_boto3_autoscaling.client import AutoScalingClient
    from mypy_boto3_ec2.client import EC2Client

_CONNECT_SECONDS, _READ_SECONDS = 5.0, 20.0
_ATTEMPTS = 2
_ACTIVITIES = 20
_PAGE_INSTANCES = 50
_MAX_INSTANCES = 10_000

_THROTTLED = frozenset(
    {
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "TooManyRequestsException",
        "RequestThrottled",
    }
)
_NO_CAPACITY = frozenset(
    {
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InstanceLimitExceeded",
        "LimitExceeded",
        "VcpuLimitExceeded",
        "MaxSpotInstanceCountExceeded",
    }
)
_CONFLICTS = frozenset(
    {"ResourceContention", "ScalingActivityInProgress", "ResourceInUse", "IncorrectInstanceState"}
)
_PASSING = frozenset(
    {"InternalFailure", "InternalError", "ServiceUnavailable", "Unavailable", "RequestTimeout"}
)

_WARM_STAGES = {
    "Warmed:Pending": Stage.BOOTING,
    "Warmed:Pending:Wait": Stage.UP,
    "Warmed:Pending:Proceed": Stage.UP,
    "Warmed:Pending:Retained": Stage.FAILED,
    "Warmed:Running": Stage.UP,
    "Warmed:Stopped": Stage.STANDBY,
    "Warmed:Hibernated": Stage.STANDBY,
}
_GATED = frozenset({"Warmed:Pending", "Warmed:Pending:Wait", "Pending:Wait", "Pending"})


class Ec2:
    """`provider.Provider`."""

    def __init__(self, settings: Ec2Provider, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._clock = clock
        config = botocore.client.Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"},
        )
        with _ours("begin"):
            self._groups: AutoScalingClient = _session().client(
                "autoscaling", settings.region, endpoint_url=settings.endpoint_url, config=config
            )
            self._instances: EC2Client = _session().client(
                "ec2", settings.region, endpoint_url=settings.endpoint_url, config=config
            )

    def observe(self) -> Sequence[Machine]:
        """See Provider."""
        with _ours("describe groups"):
            return sorted(self._machines(self._settings.classes), key=lambda each: each.name)

    def hold(self, node_class: str, count: int, release: Collection[str] = ()) -> None:
        """See Provider. Which surplus instances go is the group's choice: `release` is not heard."""
        settings = self._of(node_class)
        with _ours(f"hold {count} in {settings.auto_scaling_group}"):
            configuration, _ = self._warm_pool(settings)
            wanted: dict[str, Any] = {
                "MinSize": count,
                "MaxGroupPreparedCapacity": count,
                "PoolState": settings.pool_state,
                "InstanceReusePolicy": {"ReuseOnScaleIn": settings.reuse},
            }
            if any(configuration.get(key) != value for key, value in wanted.items()):
                self._groups.put_warm_pool(AutoScalingGroupName=settings.auto_scaling_group, **wanted)
                return
            held = sum(each.stage in HELD for each in self._machines({node_class: settings}))
            refused = self._refusal(settings) if held < count else ""
        if refused:
            raise errors.CapacityError(f"{settings.auto_scaling_group}: {refused}")

    def serve(self, node_class: str, count: int) -> None:
        """See Provider."""
        settings = self._of(node_class)
        with _ours(f"have {count} of {settings.auto_scaling_group} in service"):
            group = self._described({node_class: settings})[node_class]
            if count <= group["DesiredCapacity"]:
                return
            if count > group["MaxSize"]:
                raise errors.ConfigurationError(
                    f"{settings.auto_scaling_group}: {count} instances are wanted in service and the group's "
                    f"maximum is {group['MaxSize']}; raise its MaxSize or lower the class's cap"
                )
            self._groups.set_desired_capacity(
                AutoScalingGroupName=settings.auto_scaling_group, DesiredCapacity=count, HonorCooldown=False
            )

    def admit(self, name: str) -> None:
        """Complete the launching hook's action."""
        machine = self._find(name)
        settings = self._of(machine.node_class)
        if machine.admitted or settings.lifecycle_hook is None:
            return
        with _ours(f"admit {name}"):
            self._groups.complete_lifecycle_action(
                LifecycleHookName=settings.lifecycle_hook,
                AutoScalingGroupName=settings.auto_scaling_group,
                InstanceId=name,
                LifecycleActionResult="CONTINUE",
            )

    def replace(self, name: str) -> None:
        """See Provider. Instances of a warm pool are ended by EC2 itself; Auto Scaling refuses to end them,
        and launches others in their place."""
        try:
            machine = self._find(name)
        except errors.NotFoundError:
            return
        if machine.stage in (Stage.HANDED, Stage.LEAVING):
            return
        with _ours(f"end {name}"):
            self._instances.terminate_instances(InstanceIds=[name])

    def close(self) -> None:
        """See Provider."""
        self._groups.close()
        self._instances.close()

    # -- inside ------------------------------------------------------------------------------------

    def _of(self, node_class: str) -> Ec2Class:
        if node_class not in self._settings.classes:
            raise errors.ConfigurationError(f"provider.classes: there is no class {node_class!r}; add it")
        return self._settings.classes[node_class]

    def _find(self, name: str) -> Machine:
        for machine in self.observe():
            if machine.name == name:
                return machine
        raise errors.NotFoundError(f"no group of this pool has an instance {name}")

    def _machines(self, classes: Mapping[str, Ec2Class]) -> list[Machine]:
        groups = self._described(classes)
        states: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for name, settings in classes.items():
            _, warm = self._warm_pool(settings)
            for each in (*groups[name].get("Instances", []), *warm):
                states[each["InstanceId"]] = (name, each)
        details = self._details(list(states))
        now = self._clock()
        return [
            _machine(name, classes[name], state, details.get(instance, {}), now)
            for instance, (name, state) in states.items()
            if state.get("LifecycleState") != "Warmed:Terminated"
        ]

    def _described(self, classes: Mapping[str, Ec2Class]) -> dict[str, Mapping[str, Any]]:
        """The group of each class."""
        names = {each.auto_scaling_group for each in classes.values()}
        pages = self._groups.get_paginator("describe_auto_scaling_groups").paginate(
            AutoScalingGroupNames=sorted(names)
        )
        found = {each["AutoScalingGroupName"]: each for page in pages for each in page["AutoScalingGroups"]}
        if missing := sorted(names - set(found)):
            raise errors.ConfigurationError(
                f"there is no Auto Scaling group {missing[0]!r} in {self._groups.meta.region_name}; "
                "create it, or mend auto_scaling_group"
            )
        return {name: dict(found[each.auto_scaling_group]) for name, each in classes.items()}

    def _warm_pool(self, settings: Ec2Class) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
        """Its configuration, empty without one, and its instances."""
        found: list[Mapping[str, Any]] = []
        token = ""
        while True:
            page: Mapping[str, Any] = self._groups.describe_warm_pool(
                AutoScalingGroupName=settings.auto_scaling_group,
                MaxRecords=_PAGE_INSTANCES,
                **({"NextToken": token} if token else {}),
            )
            found += page.get("Instances", [])
            token = page.get("NextToken", "")
            if not token or len(found) > _MAX_INSTANCES:
                return page.get("WarmPoolConfiguration") or {}, found

    def _details(self, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        out: dict[str, Mapping[str, Any]] = {}
        for start in range(0, len(names), _PAGE_INSTANCES):
            several = names[start : start + _PAGE_INSTANCES]
            # By filter and not by id: an instance that has just gone is no error then.
            answer = self._instances.describe_instances(
                Filters=[{"Name": "instance-id", "Values": list(several)}]
            )
            for reservation in answer["Reservations"]:
                for each in reservation.get("Instances", []):
                    out[each["InstanceId"]] = dict(each)
        return out

    def _refusal(self, settings: Ec2Class) -> str:
        """Why the last launch failed, if that was lately and none has succeeded since."""
        activities = self._groups.describe_scaling_activities(
            AutoScalingGroupName=settings.auto_scaling_group, MaxRecords=_ACTIVITIES
        )["Activities"]
        earliest = self._clock() - settings.refused_within_seconds
        launches = [each for each in activities if "aunching" in each.get("Description", "")]
        last = max(launches, key=lambda each: each["StartTime"], default=None)
        if last is None or _seconds(last["StartTime"]) < earliest or last["StatusCode"] != "Failed":
            return ""
        return str(last.get("StatusMessage") or "a launch failed")[:300]


@functools.cache
def _session() -> boto3.session.Session:
    """One for the process: it holds the service models, megabytes of JSON."""
    return boto3.session.Session()


def _machine(
    node_class: str, settings: Ec2Class, state: Mapping[str, Any], detail: Mapping[str, Any], now: float
) -> Machine:
    said = str(state.get("LifecycleState", ""))
    launched_at = _seconds(detail["LaunchTime"]) if "LaunchTime" in detail else now
    running = detail.get("State", {}).get("Name")
    stage, reason = _stage(said, running), ""
    if stage is not Stage.HANDED and state.get("HealthStatus", "Healthy").lower() != "healthy":
        stage, reason = Stage.FAILED, "EC2 says that it is unhealthy"
    elif stage is Stage.FAILED:
        reason = f"the group says {said}"
    gated = said in _GATED and (settings.lifecycle_hook is not None or said in ("Warmed:Pending", "Pending"))
    return Machine(
        str(state["InstanceId"]),
        node_class,
        stage,
        launched_at,
        launched_at,
        launched_at,
        detail.get("PrivateIpAddress"),
        not gated,
        reason,
    )


def _stage(said: str, running: str | None) -> Stage:
    if said in _WARM_STAGES:
        return Stage.BOOTING if running == "pending" else _WARM_STAGES[said]
    if "Terminat" in said or "Detach" in said or said in ("EnteringStandby", "Standby", "Quarantined"):
        return Stage.LEAVING
    return Stage.HANDED  # of the group itself: in service, or on its way there


def _seconds(at: datetime.datetime) -> float:
    return at.timestamp()


@contextlib.contextmanager
def _ours(what: str) -> Iterator[None]:
    """botocore's errors as ours."""
    try:
        yield
    except botocore.exceptions.ClientError as exc:
        raise _client_error(what, exc) from exc
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as exc:
        raise errors.ConfigurationError(
            f"EC2: cannot {what}: {exc}: give this machine a role or a profile"
        ) from exc
    except botocore.exceptions.NoRegionError as exc:
        raise errors.ConfigurationError(f"EC2: cannot {what}: name provider.region") from exc
    except (
        botocore.exceptions.ParamValidationError,
        botocore.exceptions.InvalidRegionError,
        ValueError,
    ) as exc:
        raise errors.ConfigurationError(f"EC2: cannot {what}: {exc}") from exc
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.HTTPClientError) as exc:
        raise errors.UnavailableError(f"EC2: cannot {what}: {exc}") from exc


def _client_error(what: str, exc: botocore.exceptions.ClientError) -> errors.WarmPoolError:
    code = str(exc.response.get("Error", {}).get("Code", ""))
    status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    text = f"EC2: cannot {what}: {code}: {str(exc.response.get('Error', {}).get('Message', ''))[:300]}"
    if code in _THROTTLED or status == 429:
        return errors.ThrottledError(text)
    if code in _NO_CAPACITY:
        return errors.CapacityError(text)
    if code in _CONFLICTS or "No active Lifecycle Action" in text:
        return errors.ConflictError(text)
    if code in _PASSING or status >= 500:
        return errors.UnavailableError(text)
    return errors.ConfigurationError(text)

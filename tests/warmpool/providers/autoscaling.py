"""moto's server with what it lacks of warm pools.

moto (5.2) takes PutWarmPool and remembers it, and that is all: DescribeWarmPool never has an instance,
CompleteLifecycleAction does not exist, DescribeScalingActivities is always empty, and a group that scales out
never looks at its warm pool. What is added here does those four, on moto's own instances and groups, behind
moto's HTTP and its XML, by what the AWS documentation says: an absolute size, the launching hook's wait on
the way into the pool and again into service, admitted instances first, reuse, failed launches as activities.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from tests.warmpool.providers.platform import CLASSES
from warmpool.provider import Provider
from warmpool.providers.ec2 import Ec2
from warmpool.settings import Ec2Provider

REGION = "us-east-1"
HOOK = "warm"
_IMAGE = "ami-12c6146b"


class Autoscaling:
    """See the module. Groups are named after their classes and a number of this object's."""

    _runs = itertools.count()

    def __init__(self, url: str, pool_state: str = "Stopped") -> None:
        number = next(self._runs)
        self.pools: dict[str, dict[str, str]] = {}
        self.activities: dict[str, list[dict[str, Any]]] = {}
        self.refused: set[str] = set()
        self.failing: tuple[str, int] | None = None
        self.settings = Ec2Provider.model_validate(
            {
                "kind": "ec2",
                "region": REGION,
                "endpoint_url": url,
                "classes": {
                    name: {
                        "auto_scaling_group": f"{name}-{number}",
                        "lifecycle_hook": HOOK,
                        "pool_state": pool_state,
                    }
                    for name in CLASSES
                },
            }
        )
        self.groups = _client("autoscaling", url)
        self.instances = _client("ec2", url)
        for each in self.settings.classes.values():
            self._make(each.auto_scaling_group)

    # -- Platform ----------------------------------------------------------------------------------

    def provider(self) -> Provider:
        return Ec2(self.settings)

    def settle(self) -> None:
        for each in self.settings.classes.values():
            self._settle(each.auto_scaling_group)

    def work(self, node_class: str, count: int) -> None:
        name = self.settings.classes[node_class].auto_scaling_group
        if count > self._group(name)["DesiredCapacity"]:
            self.groups.set_desired_capacity(AutoScalingGroupName=name, DesiredCapacity=count)

    def finish(self, name: str) -> None:
        """Scale-in of this instance, with the reuse policy."""
        for each in self.settings.classes.values():
            group = each.auto_scaling_group
            if name in [found["InstanceId"] for found in self._group(group)["Instances"]]:
                self.groups.detach_instances(
                    AutoScalingGroupName=group, InstanceIds=[name], ShouldDecrementDesiredCapacity=True
                )
                self.pools.setdefault(group, {})[name] = f"Warmed:{each.pool_state}"
                self._settle(group)

    def refuse(self, node_class: str) -> None:
        self.refused.add(self.settings.classes[node_class].auto_scaling_group)

    def accept(self, node_class: str) -> None:
        self.refused.discard(self.settings.classes[node_class].auto_scaling_group)

    @contextlib.contextmanager
    def throttled(self) -> Iterator[None]:
        self.failing = ("Throttling", 400)
        yield
        self.failing = None

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.failing = ("ServiceUnavailable", 503)
        yield
        self.failing = None

    # -- what moto lacks ---------------------------------------------------------------------------

    def described(self, group: str) -> list[dict[str, Any]]:
        self._forget_ended(group)
        return [
            {
                "InstanceId": name,
                "AvailabilityZone": f"{REGION}a",
                "LifecycleState": state,
                "HealthStatus": "Healthy",
            }
            for name, state in self.pools.get(group, {}).items()
        ]

    def completed(self, group: str, instance: str) -> bool:
        """Whether there was an action to complete."""
        state = self.pools.get(group, {}).get(instance)
        if state != "Warmed:Pending:Wait":
            return False
        self.pools[group][instance] = "Warmed:Pending:Proceed"
        return True

    def taken(self, group: str, count: int) -> list[str]:
        """Instances that leave the warm pool for service."""
        ready = [
            name
            for name, state in self.pools.get(group, {}).items()
            if state in ("Warmed:Stopped", "Warmed:Hibernated", "Warmed:Running")
        ][: max(0, count)]
        for name in ready:
            del self.pools[group][name]
        return ready

    # -- inside ------------------------------------------------------------------------------------

    def _make(self, name: str) -> None:
        self.groups.create_launch_configuration(
            LaunchConfigurationName=name, ImageId=_IMAGE, InstanceType="t2.micro"
        )
        self.groups.create_auto_scaling_group(
            AutoScalingGroupName=name,
            LaunchConfigurationName=name,
            AvailabilityZones=[f"{REGION}a"],
            MinSize=0,
            MaxSize=10,
            DesiredCapacity=0,
        )

    def _group(self, name: str) -> dict[str, Any]:
        found = self.groups.describe_auto_scaling_groups(AutoScalingGroupNames=[name])
        return dict(found["AutoScalingGroups"][0])

    def _settle(self, group: str) -> None:
        self._forget_ended(group)
        pool = self.pools.setdefault(group, {})
        answer = self.groups.describe_warm_pool(AutoScalingGroupName=group)
        configuration = answer.get("WarmPoolConfiguration")
        if not configuration:
            return
        size = configuration["MinSize"]
        for name in sorted(pool)[size:]:
            self.instances.terminate_instances(InstanceIds=[name])
            del pool[name]
        for _ in range(size - len(pool)):
            if group in self.refused:
                self._activity(group, "Failed", "We currently do not have sufficient capacity in this zone")
                break
            made = self.instances.run_instances(ImageId=_IMAGE, MinCount=1, MaxCount=1)["Instances"][0]
            pool[made["InstanceId"]] = "Warmed:Pending:Wait"
            self._activity(group, "Successful", "")
        for name, state in pool.items():
            if state == "Warmed:Pending:Proceed":
                pool[name] = f"Warmed:{configuration['PoolState']}"

    def _forget_ended(self, group: str) -> None:
        pool = self.pools.get(group, {})
        if not pool:
            return
        found = self.instances.describe_instances(
            Filters=[
                {"Name": "instance-id", "Values": sorted(pool)},
                {"Name": "instance-state-name", "Values": ["pending", "running", "stopped"]},
            ]
        )
        alive = {each["InstanceId"] for some in found["Reservations"] for each in some["Instances"]}
        for name in set(pool) - alive:
            del pool[name]

    def _activity(self, group: str, status: str, message: str) -> None:
        several = self.activities.setdefault(group, [])
        several.append(
            {
                "ActivityId": str(len(several)),
                "AutoScalingGroupName": group,
                "Cause": "the warm pool's size",
                "Description": "Launching a new EC2 instance",
                "StartTime": datetime.datetime.now(datetime.UTC),
                "StatusCode": status,
                "StatusMessage": message,
            }
        )


@functools.cache
def _client(service: str, url: str) -> Any:
    return boto3.client(service, region_name=REGION, endpoint_url=url)  # type: ignore[call-overload]


@contextlib.contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Autoscaling]]]:
    """The server's URL, and where who lives behind it is put."""
    worlds: list[Autoscaling] = []
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    # Here, because each process of a test run imports this file, and moto's EC2 takes it a second.
    from moto.server import ThreadedMotoServer

    _extend(monkeypatch, worlds)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}", worlds
    finally:
        server.stop()


def _extend(monkeypatch: pytest.MonkeyPatch, worlds: list[Autoscaling]) -> None:
    import moto.autoscaling.exceptions
    import moto.autoscaling.models
    import moto.autoscaling.responses
    from moto.core.responses import ActionResult, EmptyResult

    responses = moto.autoscaling.responses.AutoScalingResponse
    backend = moto.autoscaling.models.AutoScalingBackend
    error = moto.autoscaling.exceptions.AutoscalingClientError
    groups, desired = responses.describe_auto_scaling_groups, backend.set_desired_capacity

    def fail_as_ordered() -> None:
        for world in worlds:
            if world.failing is not None:
                failure = error(f"{world.failing[0]}: ordered by the test")
                failure.code, failure.http_status_code = world.failing
                raise failure

    def describe_groups(self: Any) -> ActionResult:
        fail_as_ordered()
        return groups(self)

    def describe_warm_pool(self: Any) -> ActionResult:
        fail_as_ordered()
        group = self._get_param("AutoScalingGroupName")
        instances = [each for world in worlds for each in world.described(group)]
        configuration = self.autoscaling_backend.describe_warm_pool(group_name=group)
        return ActionResult({"WarmPoolConfiguration": configuration, "Instances": instances})

    def complete_lifecycle_action(self: Any) -> ActionResult:
        asked = [self._get_param("AutoScalingGroupName"), self._get_param("InstanceId")]
        if not any(world.completed(*asked) for world in worlds):
            failure = error("No active Lifecycle Action found with instance ID " + asked[1])
            failure.code = "ValidationError"
            raise failure
        return EmptyResult()

    def describe_scaling_activities(self: Any) -> ActionResult:
        group = self._get_param("AutoScalingGroupName")
        return ActionResult(
            {"Activities": [each for world in worlds for each in reversed(world.activities.get(group, []))]}
        )

    def set_desired_capacity(self: Any, group_name: str, desired_capacity: int) -> None:
        group = self.autoscaling_groups[group_name]
        missing = desired_capacity - len(group.instance_states)
        for world in worlds:
            taken = world.taken(group_name, missing)
            if taken:
                self.attach_instances(group_name, taken)
        desired(self, group_name, desired_capacity)

    monkeypatch.setattr(responses, "describe_auto_scaling_groups", describe_groups)
    monkeypatch.setattr(responses, "describe_warm_pool", describe_warm_pool)
    monkeypatch.setattr(responses, "complete_lifecycle_action", complete_lifecycle_action, raising=False)
    monkeypatch.setattr(responses, "describe_scaling_activities", describe_scaling_activities)
    monkeypatch.setattr(backend, "set_desired_capacity", set_desired_capacity)

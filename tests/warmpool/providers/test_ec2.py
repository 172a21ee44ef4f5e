"""What only EC2 does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.warmpool.providers.autoscaling import Autoscaling
from warmpool import errors
from warmpool.provider import Stage
from warmpool.providers.ec2 import Ec2
from warmpool.settings import Ec2Provider

pytestmark = pytest.mark.filterwarnings("ignore:Exception.*does not match an error shape")


def group(cloud: Autoscaling) -> str:
    return cloud.settings.classes["gpu"].auto_scaling_group


def test_the_size_of_the_warm_pool_is_absolute_and_is_said_once(
    cloud: Autoscaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Ec2(cloud.settings)
    provider.hold("gpu", 3)
    said = cloud.groups.describe_warm_pool(AutoScalingGroupName=group(cloud))["WarmPoolConfiguration"]
    assert (said["MinSize"], said["MaxGroupPreparedCapacity"]) == (3, 3)
    assert said["PoolState"] == "Stopped"
    assert said["InstanceReusePolicy"] == {"ReuseOnScaleIn": True}

    def never(**arguments: Any) -> None:
        raise AssertionError("the same size is not put again: that would be throttled")

    monkeypatch.setattr(provider._groups, "put_warm_pool", never)
    provider.hold("gpu", 3)


def test_an_instance_stands_by_once_it_was_warm(cloud: Autoscaling) -> None:
    provider = Ec2(cloud.settings)
    provider.hold("gpu", 1)
    cloud.settle()
    (machine,) = provider.observe()
    assert (machine.stage, machine.admitted) == (Stage.UP, False)
    provider.admit(machine.name)
    cloud.settle()
    (machine,) = provider.observe()
    assert (machine.stage, machine.admitted) == (Stage.STANDBY, True)


def test_the_group_s_maximum_is_told(cloud: Autoscaling) -> None:
    with pytest.raises(errors.ConfigurationError, match="raise its MaxSize"):
        Ec2(cloud.settings).serve("gpu", 11)


def test_a_group_that_is_not_there_is_the_settings_fault(cloud: Autoscaling) -> None:
    whole = cloud.settings.model_dump(mode="json")
    whole["classes"]["gpu"]["auto_scaling_group"] = "nosuch"
    provider = Ec2(Ec2Provider.model_validate(whole))
    with pytest.raises(errors.ConfigurationError, match="nosuch"):
        provider.observe()


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("AccessDenied", 403, errors.ConfigurationError),
        ("ExpiredToken", 403, errors.ConfigurationError),
        ("RequestLimitExceeded", 400, errors.ThrottledError),
        ("InsufficientInstanceCapacity", 400, errors.CapacityError),
        ("VcpuLimitExceeded", 400, errors.CapacityError),
        ("ScalingActivityInProgress", 400, errors.ConflictError),
        ("InternalFailure", 500, errors.UnavailableError),
        ("SomethingNew", 400, errors.ConfigurationError),
    ],
)
def test_errors_are_told_by_who_can_act(
    cloud: Autoscaling, code: str, status: int, kind: type[errors.WarmPoolError]
) -> None:
    cloud.failing = (code, status)
    with pytest.raises(kind) as caught:
        Ec2(cloud.settings).observe()
    assert type(caught.value) is kind
    assert code in str(caught.value)


def test_nobody_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    settings = {
        "kind": "ec2",
        "region": "us-east-1",
        "endpoint_url": "http://127.0.0.1:1",
        "classes": {"gpu": {"auto_scaling_group": "g"}},
    }
    with pytest.raises(errors.UnavailableError):
        Ec2(Ec2Provider.model_validate(settings)).observe()

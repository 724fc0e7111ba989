"""A stand-in for rclpy, its messages and its launch files: as much of their interface as a node needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest


@dataclass
class Header:
    stamp: Any = field(default_factory=lambda: SimpleNamespace(sec=0, nanosec=0))
    frame_id: str = ""


@dataclass
class Image:
    header: Header = field(default_factory=Header)
    height: int = 0
    width: int = 0
    encoding: str = "rgb8"
    step: int = 0
    data: bytes = b""


@dataclass
class String:
    data: str = ""


@dataclass
class Detection2D:
    header: Header = field(default_factory=Header)
    results: list[Any] = field(default_factory=list)
    bbox: Any = field(
        default_factory=lambda: SimpleNamespace(
            center=SimpleNamespace(position=SimpleNamespace(x=0.0, y=0.0), theta=0.0), size_x=0.0, size_y=0.0
        )
    )
    id: str = ""


@dataclass
class Detection2DArray:
    header: Header = field(default_factory=Header)
    detections: list[Any] = field(default_factory=list)


class ObjectHypothesisWithPose:
    def __init__(self) -> None:
        self.hypothesis = SimpleNamespace(class_id="", score=0.0)


class Node:
    """Keeps what is published, and gives messages to the callbacks of its subscriptions."""

    parameters: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str) -> None:
        self.name, self.destroyed = name, False
        self.callbacks: dict[str, Callable[[Any], None]] = {}
        self.published: dict[str, list[Any]] = {}
        self.logged: list[str] = []

    def declare_parameter(self, name: str, value: Any) -> Any:
        return SimpleNamespace(value=self.parameters.get(name, value))

    def create_subscription(self, kind: type, topic: str, callback: Callable[[Any], None], qos: Any) -> None:
        self.callbacks[topic] = callback

    def create_publisher(self, kind: type, topic: str, depth: int) -> Any:
        messages = self.published.setdefault(topic, [])

        def publish(message: Any) -> None:
            assert isinstance(message, kind)
            messages.append(message)

        return SimpleNamespace(publish=publish)

    def get_logger(self) -> Any:
        return SimpleNamespace(error=self.logged.append, info=self.logged.append)

    def destroy_node(self) -> None:
        self.destroyed = True


@dataclass
class LaunchConfiguration:
    """The value of a launch argument, in a context that is the dictionary of these values."""

    name: str

    def perform(self, context: dict[str, str]) -> str:
        return context[self.name]


class ExternalShutdownException(Exception):
    """What spinning ends with where a signal or another thread has shut ROS down."""


def install(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put the stand-ins where Python imports from; return what was done with them."""
    seen = SimpleNamespace(shut_down=0, spin=lambda node: None)

    def module(name: str, **values: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, made)

    def shut_down() -> None:
        seen.shut_down += 1

    def spin(node: Any) -> None:
        seen.spin(node)  # which tests may replace

    module("rclpy", init=lambda: None, spin=spin, try_shutdown=shut_down)
    module("rclpy.executors", ExternalShutdownException=ExternalShutdownException)
    module("rclpy.node", Node=Node)
    module("rclpy.qos", qos_profile_sensor_data="sensor data")
    module("sensor_msgs")
    module("sensor_msgs.msg", Image=Image)
    module("std_msgs")
    module("std_msgs.msg", String=String)
    module("vision_msgs")
    module(
        "vision_msgs.msg",
        Detection2D=Detection2D,
        Detection2DArray=Detection2DArray,
        ObjectHypothesisWithPose=ObjectHypothesisWithPose,
    )
    module("launch", LaunchDescription=lambda entities: SimpleNamespace(entities=entities), LaunchContext=dict)
    module(
        "launch.actions",
        DeclareLaunchArgument=lambda name, **values: SimpleNamespace(name=name, **values),
        ExecuteProcess=SimpleNamespace,
        OpaqueFunction=SimpleNamespace,
    )
    module("launch.substitutions", LaunchConfiguration=LaunchConfiguration)
    return seen

"""The ROS 2 node on stand-ins for rclpy: pictures in, detections and events out, and a clean end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from bridge_stg.runtime.grounder import Grounder
from tests.examples import ros2_stand_in
from tests.examples.loading import EXAMPLES, load
from tests.fakes.live_chain import live_grounder, stream

START_S = 1_700_000_000.0


@pytest.fixture
def ros(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(ros2_stand_in.Node, "parameters", {"queries": ["the car", "the dog"], "window_s": 8})
    seen = ros2_stand_in.install(monkeypatch)
    seen.node = load("ros2/grounding_node.py")
    return seen


def message(time_s: float, picture: np.ndarray, encoding: str = "bgr8", padding: int = 0) -> Any:
    rows = picture[..., ::-1] if encoding.startswith("bgr") else picture
    rows = np.pad(rows.reshape(len(rows), -1), ((0, 0), (0, padding)))
    made = ros2_stand_in.Image(height=len(rows), width=picture.shape[1], encoding=encoding, step=rows.shape[1])
    made.header.stamp.sec, made.header.stamp.nanosec = int(time_s), round(time_s % 1 * 1e9)
    made.header.frame_id, made.data = "camera", rows.tobytes()
    return made


def waited(until: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.01)
    return until()


def test_detections_and_events(ros: SimpleNamespace) -> None:
    node = ros.node.GroundingNode(live_grounder())
    for time_s, picture in stream(12, bright=((3, 8),), start_s=START_S):
        node.callbacks["image"](message(time_s, picture, padding=5))
        assert waited(node.waiting_images.empty)
    assert waited(lambda: len(node.published["detections"]) >= 11)
    node.destroy_node()
    assert node.destroyed and not node.worker.is_alive() and not node.logged
    events = [json.loads(event.data) for event in node.published["events"]]
    assert [(event["event"], event["query"], event["time_s"] - START_S) for event in events] == [
        ("appeared", "the car", 3), ("appeared", "the dog", 3), ("left", "the car", 8), ("left", "the dog", 8)
    ]  # fmt: skip
    counts = [len(array.detections) for array in node.published["detections"]]
    assert counts[:2] == [0, 0] and counts[4] == 2 and counts[-1] == 0
    detection = node.published["detections"][4].detections[0]
    assert detection.header.frame_id == "camera" and detection.header.stamp.sec == START_S + 4
    assert detection.id == "the car" == detection.results[0].hypothesis.class_id
    assert 0.9 < detection.results[0].hypothesis.score <= 1
    assert 0 < detection.bbox.size_x < 64 and 0 < detection.bbox.center.position.x < 64


def test_the_callback_never_waits(ros: SimpleNamespace) -> None:
    grounder = live_grounder()
    session: Any = grounder.sessions["vision_encoder"]
    session.session.before = lambda feeds: time.sleep(0.5)
    node = ros.node.GroundingNode(grounder)
    began = time.monotonic()
    for time_s, picture in stream(60, start_s=START_S):
        node.callbacks["image"](message(time_s, picture))
        node.callbacks["image"](message(time_s, picture))  # one that came twice
    assert time.monotonic() - began < 5 and node.lost > 0
    node.destroy_node()
    assert not node.worker.is_alive()


def test_pictures_of_every_encoding(ros: SimpleNamespace) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (6, 5, 3), np.uint8)
    for encoding in ("rgb8", "bgr8"):
        np.testing.assert_array_equal(ros.node.rgb_of(message(0, picture, encoding, padding=3)), picture)
    alpha = np.dstack([picture, np.zeros((6, 5), np.uint8)])
    given = message(0, alpha, "rgba8")
    np.testing.assert_array_equal(ros.node.rgb_of(given), picture)
    grey = np.repeat(picture[..., :1], 3, axis=2)
    np.testing.assert_array_equal(ros.node.rgb_of(message(0, grey[..., :1], "mono8", padding=2)), grey)
    with pytest.raises(ValueError, match="16UC1"):
        ros.node.rgb_of(message(0, picture, "16UC1"))


def test_a_bad_image_is_logged_and_ends_the_node(ros: SimpleNamespace) -> None:
    node = ros.node.GroundingNode(live_grounder())
    node.callbacks["image"](message(1.0, np.zeros((48, 64, 3), np.uint8), "yuv422"))
    assert waited(lambda: ros.shut_down == 1) and "yuv422" in node.logged[0]
    node.destroy_node()


@pytest.mark.parametrize("end", [KeyboardInterrupt, ros2_stand_in.ExternalShutdownException])
def test_main_spins_and_stops(end: type[BaseException], ros: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = []

    def spin(node: Any) -> None:
        nodes.append(node)
        raise end

    ros.spin = spin
    monkeypatch.setattr(Grounder, "load", lambda bundle: live_grounder())
    ros.node.main()
    assert nodes[0].destroyed and ros.shut_down == 1


@pytest.mark.parametrize("query", ["the red car", 'the dog\'s "new" ball: a, [b] # \\ 犬 🐕'])
def test_the_launch_file_starts_the_node(ros: SimpleNamespace, query: str) -> None:
    *declared, node = load("ros2/watch.launch.py").generate_launch_description().entities
    given = {argument.name: argument.default_value for argument in declared}
    assert set(given) == {"bundle", "image", "query", "every_s", "window_s"}
    (process,) = node.function({**given, "query": query, "bundle": "/data/v2: new"})
    assert process.cmd[1] == str(EXAMPLES / "ros2" / "grounding_node.py") and Path(process.cmd[1]).exists()
    parameters = dict(text.split(":=", 1) for text in process.cmd[process.cmd.index("--ros-args") :] if ":=" in text)
    assert yaml.safe_load(parameters["queries"]) == [query]
    assert yaml.safe_load(parameters["bundle"]) == "/data/v2: new"
    assert yaml.safe_load(parameters["every_s"]) == 1.0 and process.respawn

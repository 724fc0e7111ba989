"""ROS 2 node that runs standing queries on an image topic; see README.md in this folder.

Subscribes to `image` (sensor_msgs/Image); publishes `detections` (vision_msgs/Detection2DArray), one message per round,
and `events` (std_msgs/String, JSON): appeared, moved, left. The callback only queues the image; the model runs in its
own thread on the newest frames.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import String
from vision_msgs.msg import Detection2D, Detection2DArray, ObjectHypothesisWithPose

from bridge_stg.runtime import BridgeError, Grounder, LiveUpdate

CHANNELS = {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2), "bgra8": (2, 1, 0), "mono8": (0, 0, 0)}
WAITING_IMAGES = 8


def rgb_of(message: Any) -> np.ndarray:
    """Convert a sensor_msgs/Image to uint8 RGB [height, width, 3] without cv_bridge.

    Raises:
        ValueError: the encoding is not in `CHANNELS`.
    """
    order = CHANNELS.get(message.encoding)
    if order is None:
        raise ValueError(f"images are encoded as {message.encoding!r}; expected one of: {', '.join(CHANNELS)}")
    channels = {"mono8": 1, "rgba8": 4, "bgra8": 4}.get(message.encoding, 3)
    rows = np.frombuffer(bytes(message.data), np.uint8).reshape(message.height, message.step)  # rows may be padded
    picture = rows[:, : message.width * channels].reshape(message.height, message.width, channels)
    return np.ascontiguousarray(picture[..., list(order)])


def seconds_of(stamp: Any) -> float:
    """Convert a builtin_interfaces/Time to seconds."""
    return stamp.sec + stamp.nanosec * 1e-9


class GroundingNode(Node):
    """Runs standing queries on the newest seconds of an image topic.

    Parameters: `bundle` (folder), `queries` (list of strings), `every_s`, `window_s`, `stall_s`.
    """

    def __init__(self, grounder: Grounder | None = None) -> None:
        super().__init__("bridge_stg")
        bundle = self.declare_parameter("bundle", "").value
        queries = self.declare_parameter("queries", ["the red car"]).value
        every_s = self.declare_parameter("every_s", 1.0).value
        window_s = self.declare_parameter("window_s", 16.0).value
        stall_s = self.declare_parameter("stall_s", 30.0).value
        self.lost = 0
        self.waiting_images: queue.Queue[Any] = queue.Queue(WAITING_IMAGES)
        self._newest_s, self._frame_id = -1.0, ""
        self._grounder = grounder or Grounder.load(bundle)
        self._watch = self._grounder.watch(
            self._frames(), list(queries), every_s=every_s, window_s=window_s, stall_s=stall_s, latest_wins=True
        )
        self._detections = self.create_publisher(Detection2DArray, "detections", 10)
        self._events = self.create_publisher(String, "events", 10)
        self.create_subscription(Image, "image", self._take, qos_profile_sensor_data)
        self.worker = threading.Thread(target=self._run, daemon=True)
        self.worker.start()

    def destroy_node(self) -> None:
        """Stop the watch and free the model."""
        self._watch.stop()
        self._put(None)
        self.worker.join(10)
        self._grounder.close()
        super().destroy_node()

    def _take(self, message: Any) -> None:
        """Queue an image; repeated and late ones are dropped."""
        time_s = seconds_of(message.header.stamp)
        if time_s > self._newest_s:
            self._newest_s = time_s
            self._put((time_s, message))

    def _put(self, item: Any) -> None:
        while True:
            try:
                self.waiting_images.put_nowait(item)
                return
            except queue.Full:
                self.lost += 1
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            self.waiting_images.get_nowait()
        except queue.Empty:
            return

    def _frames(self) -> Iterator[tuple[float, np.ndarray]]:
        while (item := self.waiting_images.get()) is not None:
            time_s, message = item
            self._frame_id = message.header.frame_id
            yield time_s, rgb_of(message)

    def _run(self) -> None:
        try:
            with self._watch as watch:
                for update in watch:
                    self._detections.publish(self._message(update))
                    for event in update.events:
                        self._events.publish(String(data=json.dumps(event.to_json())))
        except BridgeError as error:
            self.get_logger().error(str(error))
            rclpy.try_shutdown()  # the launch file starts the node again

    def _message(self, update: LiveUpdate) -> Any:
        """Return the newest box of every target that is in view at `known_s`."""
        message = Detection2DArray()
        self._stamp(message.header, update.known_s)
        for result in update.groundings:
            tube = result.tube
            if tube is None or not tube.visible.any() or tube.times[tube.visible][-1] < update.known_s - 1.0:
                continue
            newest = int(np.flatnonzero(tube.visible)[-1])
            left, top, right, bottom = (float(side) for side in tube.boxes[newest])
            detection = Detection2D()
            self._stamp(detection.header, float(tube.times[newest]))
            detection.id = result.query
            detection.bbox.center.position.x, detection.bbox.center.position.y = (left + right) / 2, (top + bottom) / 2
            detection.bbox.size_x, detection.bbox.size_y = right - left, bottom - top
            hypothesis = ObjectHypothesisWithPose()
            hypothesis.hypothesis.class_id = result.query
            hypothesis.hypothesis.score = float(tube.presence[newest])
            detection.results.append(hypothesis)
            message.detections.append(detection)
        return message

    def _stamp(self, header: Any, time_s: float) -> None:
        header.frame_id = self._frame_id
        header.stamp.sec = int(time_s)
        header.stamp.nanosec = min(999_999_999, round((time_s - int(time_s)) * 1e9))


def main() -> None:
    rclpy.init()
    node = GroundingNode()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):  # SIGINT; SIGTERM or a failed watch
        node.get_logger().info("stopped")
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()

"""Launch the node: ros2 launch ./watch.launch.py bundle:=/data/bundle image:=/camera/image_raw query:="the red car".

Texts reach the node as they are given, quotes included: ROS reads parameters as YAML, and JSON is YAML.
"""

from __future__ import annotations

import json
from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction
from launch.substitutions import LaunchConfiguration

NODE = Path(__file__).parent / "grounding_node.py"
ARGUMENTS = {
    "bundle": ("bundle", "Folder of the bundle."),
    "image": ("/camera/image_raw", "Image topic."),
    "query": ("the red car", "Query; for several, edit `queries` here or set the parameter."),
    "every_s": ("1.0", "Seconds between rounds."),
    "window_s": ("16.0", "Length of the window in seconds."),
}


def start_node(context: LaunchContext) -> list[ExecuteProcess]:
    """Return the node's process, which is restarted if it ends."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    parameters = {"bundle": given["bundle"], "queries": [given["query"]]}
    written = {name: json.dumps(value, ensure_ascii=False) for name, value in parameters.items()}
    written |= {name: given[name] for name in ("every_s", "window_s")}
    command = ["python3", str(NODE), "--ros-args", "-r", f"image:={given['image']}"]
    for name, value in written.items():
        command += ["-p", f"{name}:={value}"]
    return [ExecuteProcess(cmd=command, output="screen", respawn=True, respawn_delay=2.0)]


def generate_launch_description() -> LaunchDescription:
    """Return the launch arguments and the node."""
    declared = [
        DeclareLaunchArgument(name, default_value=value, description=text) for name, (value, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start_node)])

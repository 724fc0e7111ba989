"""Launch the node: ros2 launch ./watch.launch.py bundle:=/data/bundle image:=/camera/image_raw query:="the red car"."""

from __future__ import annotations

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess
from launch.substitutions import LaunchConfiguration

NODE = Path(__file__).parent / "grounding_node.py"
ARGUMENTS = {
    "bundle": ("bundle", "Folder of the bundle."),
    "image": ("/camera/image_raw", "Image topic."),
    "query": ("the red car", "Query; for several, edit `queries` here or set the parameter."),
    "every_s": ("1.0", "Seconds between rounds."),
    "window": ("32", "Length of the window in coarse frames."),
}


def generate_launch_description() -> LaunchDescription:
    """Return the launch arguments and the node's process, which is restarted if it ends."""
    given = {name: LaunchConfiguration(name) for name in ARGUMENTS}
    command = ["python3", str(NODE), "--ros-args", "-r", ["image:=", given["image"]]]
    command += ["-p", ["bundle:=", given["bundle"]], "-p", ["queries:=['", given["query"], "']"]]
    command += ["-p", ["every_s:=", given["every_s"]], "-p", ["window:=", given["window"]]]
    declared = [
        DeclareLaunchArgument(name, default_value=value, description=text) for name, (value, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*declared, ExecuteProcess(cmd=command, output="screen", respawn=True, respawn_delay=2.0)])

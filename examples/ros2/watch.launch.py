"""Start the node: ros2 launch ./watch.launch.py bundle:=/data/bundle image:=/camera/image_raw query:="the red car"."""

from __future__ import annotations

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess
from launch.substitutions import LaunchConfiguration

NODE = Path(__file__).parent / "grounding_node.py"
ARGUMENTS = {
    "bundle": ("bundle", "The bundle: a folder."),
    "image": ("/camera/image_raw", "The topic of images."),
    "query": ("the red car", "What to look for; for several, edit `queries` here or set the parameter."),
    "every_s": ("1.0", "Seconds between two rounds."),
    "window": ("32", "Coarse frames that the model looks back at."),
}


def generate_launch_description() -> LaunchDescription:
    """Describe the arguments and the one process, which is started again if it dies."""
    given = {name: LaunchConfiguration(name) for name in ARGUMENTS}
    command = ["python3", str(NODE), "--ros-args", "-r", ["image:=", given["image"]]]
    command += ["-p", ["bundle:=", given["bundle"]], "-p", ["queries:=['", given["query"], "']"]]
    command += ["-p", ["every_s:=", given["every_s"]], "-p", ["window:=", given["window"]]]
    declared = [
        DeclareLaunchArgument(name, default_value=value, description=text) for name, (value, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*declared, ExecuteProcess(cmd=command, output="screen", respawn=True, respawn_delay=2.0)])

"""Run queries on a video; the smallest program. Usage: python examples/embed.py BUNDLE VIDEO QUERY..."""

import sys

from bridge_stg.runtime import BridgeError, Grounder


def main(bundle: str, video: str, *queries: str) -> None:
    with Grounder.load(bundle) as grounder, grounder.open(video) as opened:
        for result in opened.ground_many(queries):
            if result.span is None or result.boxes is None:
                print(f"{result.query}: not in this video")
                continue
            print(f"{result.query}: {result.span[0]:.2f} s to {result.span[1]:.2f} s")
            for time_s, box in zip(result.boxes.times, result.boxes.boxes):
                print(f"  {time_s:6.2f} s  left, top, right, bottom:", *(f"{side:.0f}" for side in box))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except BridgeError as error:
        sys.exit(str(error))

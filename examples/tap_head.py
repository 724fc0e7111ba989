"""Train a linear classifier on the hidden states of grounded targets, as a second head besides the boxes.

python examples/tap_head.py BUNDLE LABELLED.jsonl head.npz             train; one {"video", "query", "label"} a line
python examples/tap_head.py BUNDLE --ask head.npz VIDEO QUERY          classify

The boxes are computed from the bridging queries' hidden states (`Grounding.taps`, [taps, queries, width]). Other heads
can predict from them what the target does, or whether to raise an alarm. The backbone is unchanged, and one pass of it
serves all heads.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridge_stg.runtime import Grounder

RIDGE = 1.0
"""Ridge penalty on the normalised features, of which there are far more than examples."""


@dataclass(frozen=True)
class LinearHead:
    """Linear head from normalised features [N] to label scores [C]: weight [N + 1, C], whose last row is the bias."""

    labels: list[str]
    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, labels: list[str]) -> LinearHead:
        """Fit one ridge regression per label to features [M, N] of M examples, with the M × M kernel since M << N."""
        names = sorted(set(labels))
        targets = np.array([[1.0 if label == name else -1.0 for name in names] for label in labels])
        mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
        normal = _normal(features, mean, scale)
        dual = np.linalg.solve(normal @ normal.T + RIDGE / len(features) * np.eye(len(features)), targets)
        return cls(names, mean, scale, normal.T @ dual)

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Return label scores [M, C] for features [M, N]."""
        return _normal(features, self.mean, self.scale) @ self.weight

    def label(self, features: np.ndarray) -> list[str]:
        """Return the most likely label of each example."""
        return [self.labels[i] for i in self.scores(features).argmax(axis=1)]


def _normal(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.column_stack([(features - mean) / scale / np.sqrt(len(mean)), np.ones(len(features))])


def features_of(grounder: Grounder, video: str, queries: list[str]) -> np.ndarray:
    """Return the taps of each query as one row; computes only the time span, and assumes that the target is present."""
    with grounder.open(video) as opened:
        taps = [opened.span(query, allow_none=False).taps for query in queries]
    return np.stack([tap.astype(np.float64).reshape(-1) for tap in taps if tap is not None])


def left_out_accuracy(features: np.ndarray, labels: list[str]) -> float:
    """Return the leave-one-out accuracy."""
    right = 0
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        head = LinearHead.fit(features[others], [labels[j] for j in others])
        right += head.label(features[i : i + 1])[0] == labels[i]
    return right / len(labels)


def train(bundle: str, examples: str, out: str) -> None:
    lines = Path(examples).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    folder, labels = Path(examples).parent, [row["label"] for row in rows]
    with Grounder.load(bundle) as grounder:
        features = np.concatenate([features_of(grounder, str(folder / row["video"]), [row["query"]]) for row in rows])
    head = LinearHead.fit(features, labels)
    np.savez(out, labels=np.array(head.labels), mean=head.mean, scale=head.scale, weight=head.weight)
    accuracy = left_out_accuracy(features, labels)
    print(f"{len(rows)} examples of {len(head.labels)} labels; left-out accuracy {accuracy:.2f}")


def ask(bundle: str, file: str, video: str, query: str) -> None:
    with np.load(file) as saved:
        head = LinearHead(saved["labels"].tolist(), saved["mean"], saved["scale"], saved["weight"])
    with Grounder.load(bundle) as grounder:
        features = features_of(grounder, video, [query])
    for label, score in sorted(zip(head.labels, head.scores(features)[0]), key=lambda pair: -pair[1]):
        print(f"{score:+.2f}  {label}")


def main(bundle: str, *arguments: str) -> None:
    if arguments[:1] == ("--ask",):
        ask(bundle, *arguments[1:])
    else:
        train(bundle, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])

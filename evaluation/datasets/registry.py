"""Which benchmarks there are, what files each takes, and where its reader is. Imports a reader when it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_stg.runtime.errors import AnnotationError

if TYPE_CHECKING:
    from bridge_stg.evaluation.samples import Dataset


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: the module and function that read it, what `--annotations` takes, and whether it has splits.

    Where `splits` is empty, the annotation file is the split.
    """

    module: str
    reader: str
    annotations: str
    splits: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


_REFS = "the refs as JSON and instances.json, or the folder of both"
BENCHMARKS: Mapping[str, Benchmark] = {
    "vidstg": Benchmark("vidstg", "read_vidstg", "test_annotations.json, and the folder of VidOR's annotations"),
    "hc-stvg-v1": Benchmark("hc_stvg", "read_hc_stvg_v1", "test.json"),
    "hc-stvg-v2": Benchmark("hc_stvg", "read_hc_stvg_v2", "val_v2.json"),
    "charades-sta": Benchmark("charades_sta", "read_charades_sta", "charades_sta_test.txt"),
    "refcoco": Benchmark("refcoco", "read_refcoco", _REFS, ("train", "val", "testA", "testB"), {"name": "refcoco"}),
    "refcoco+": Benchmark("refcoco", "read_refcoco", _REFS, ("train", "val", "testA", "testB"), {"name": "refcoco+"}),
    "refcocog": Benchmark("refcoco", "read_refcoco", _REFS, ("train", "val", "test"), {"name": "refcocog"}),
    "got-10k": Benchmark(
        "got10k", "read_got10k", "the root folder, which holds val and test", ("train", "val", "test")
    ),
    "jsonl": Benchmark("jsonl", "read_jsonl", "a file of the project's own format"),
}


def read_benchmark(
    name: str, annotations: Sequence[Path], media: Path | None = None, *, split: str | None = None
) -> Dataset:
    """Read a benchmark's annotation files, as published.

    Args:
        name: one of `BENCHMARKS`.
        annotations: what its entry there says.
        media: the folder that holds the videos or images; the folder of the first annotation file if not given.
        split: where the files hold several; the benchmark's own default if not given.

    Raises:
        AnnotationError: a file, line or field is not as published, or the split is unknown.
    """
    if name not in BENCHMARKS:
        raise AnnotationError(f"the benchmark {name!r} is unknown; known: {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    if not annotations:
        raise AnnotationError(f"{name} takes --annotations: {benchmark.annotations}.")
    if split is not None and split not in benchmark.splits:
        known = (
            f"has: {', '.join(benchmark.splits)}" if benchmark.splits else "has none: the annotation file is the split"
        )
        raise AnnotationError(f"{name} has no split {split!r}; it {known}.")
    for path in annotations:
        if not path.exists():
            raise AnnotationError(
                f"{path}: no such file or folder; {name} takes --annotations: {benchmark.annotations}."
            )
    if media is None:
        media = annotations[0] if annotations[0].is_dir() else annotations[0].parent
    module = importlib.import_module(f"bridge_stg.evaluation.datasets.{benchmark.module}")
    reader: Callable[..., Dataset] = getattr(module, benchmark.reader)
    return reader(annotations, media, split=split, **benchmark.options)

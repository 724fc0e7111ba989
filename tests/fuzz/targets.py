"""What users can hand in: a folder of intact files per kind, and the public function that reads it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bridge_stg.runtime.errors import BridgeError
from tests.fakes.chain import fake_grounder
from tests.fakes.clips import pictures, write

QUERY_WIDTH = 64  # of the tiny model
BODY = b"--b\r\nContent-Disposition: form-data; name="


@dataclass(frozen=True)
class Kind:
    """A kind of input: the pattern of the files that are damaged, and what reads their folder."""

    pattern: str
    read: Callable[[Path, np.random.Generator], Any]


# Intact files


def make_media(root: Path) -> None:
    """Write small videos, images and animations, one folder each."""
    frames = pictures(12)
    gop = {"x264-params": "keyint=6:bframes=2"}
    for name, options in {
        "h264.mp4": {"options": gop},
        "fragments.mp4": {"options": gop, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
        "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
        "vp9.webm": {"codec": "libvpx-vp9"},
        "h264.mkv": {"options": gop},
        "mpeg4.mov": {"codec": "mpeg4"},
        "h264.ts": {"options": gop},
        "h264.h264": {"options": gop},
    }.items():
        path = root / name.replace(".", "-") / name
        path.parent.mkdir(parents=True)
        write(path, frames, rate=4, **options)  # type: ignore[arg-type]
    images = [Image.fromarray(frame) for frame in frames]
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = images[0].convert("RGBA")
    alpha.putalpha(100)
    for name, options in {
        "a.jpg": {"exif": exif}, "a.bmp": {}, "a.tiff": {"compression": "tiff_lzw"}, "a.ppm": {}, "a.webp": {},
    }.items():  # fmt: skip
        _save(root, f"still-{name[2:]}", name, images[0], **options)  # type: ignore[arg-type]
    _save(root, "still-png", "a.png", alpha)
    _save(root, "still-png16", "a.png", Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13))
    for name in ("a.gif", "a.png", "a.webp"):
        _save(root, f"animation-{name[2:]}", name, images[0], save_all=True, append_images=images[1:], duration=200)


def _save(root: Path, kind: str, name: str, image: Image.Image, **options: Any) -> None:
    (root / kind).mkdir(parents=True)
    image.save(root / kind / name, **options)


def make_texts(root: Path) -> None:
    """Write annotation files of every dataset, tables of queries, overrides, results, and bodies of requests."""
    from tests.evaluation import official

    for name, make in official.ALL.items():
        made = make(root / f"dataset-{name}")
        places = [str(path.relative_to(root / f"dataset-{name}")) for path in made.annotations]
        about = {"name": made.name, "places": places, "split": made.split}
        (root / f"dataset-{name}" / "about").write_text(json.dumps(about))
    for kind, name, text in (
        ("queries-csv", "a.csv", "video,query,id\na.mp4,the car,1\nb.mp4,the dog,2\n"),
        (
            "queries-jsonl", "a.jsonl",
            '{"video": "a.mp4", "query": "the car"}\n{"image": "b.png", "query": "x", "id": "7"}\n',
        ),
        (
            "overrides", "a.yaml",
            "keep_float: [language_model.layers.0]\nmethods: {language_model.layers.1: minmax}\n"
            "smoothing: {language_model.layers.1/MatMul: 0.5}\n",
        ),
        (
            "profiles", "a.yaml",
            "capacity: 64\nvision_encoder:\n  coarse:\n    G: [1, 2, 3]\nlanguage_model:\n  decode: {B: [1, 1, 4]}\n",
        ),
        ("results", "a.jsonl", '{"schema": 1, "bundle": "x"}\n{"id": "1", "span": [0, 1]}\n{"id": "2"}\n'),
        (
            "request-json", "a.json",
            '{"video": "VIDEO", "queries": ["the car", "a dog"], "task": "span", "allow_none": true, "deadline_s": 5}',
        ),
    ):  # fmt: skip
        (root / kind).mkdir(parents=True)
        (root / kind / name).write_text(text)
    (root / "request-form").mkdir()
    body = BODY + b'"queries"\r\n\r\nthe car\r\n' + BODY + b'"file"; filename="a.png"\r\n\r\n'
    png = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(png, "PNG")
    (root / "request-form" / "a.form").write_bytes(body + png.getvalue() + b"\r\n--b--\r\n")
    for kind in ("array", "stream"):
        (root / kind).mkdir()
        (root / kind / "a.npy").write_bytes(bytes(64))


def make_model_files(root: Path, bundle: Path, checkpoint: Path) -> None:
    """Copy a bundle and a checkpoint with an adapter."""
    import torch
    from safetensors.torch import save_file

    from bridge_stg.model.config import BridgeSTGConfig

    shutil.copytree(bundle, root / "bundle")
    shutil.copytree(checkpoint, root / "checkpoint")
    (root / "checkpoint" / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
    (root / "checkpoint" / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"
    language = BridgeSTGConfig.load(checkpoint).model_spec().language
    a, b = torch.ones(2, language.hidden_size), torch.ones(QUERY_WIDTH, 2)
    save_file(
        {f"{name}A.weight": a, f"{name}B.weight": b}, root / "checkpoint" / "adapter" / "adapter_model.safetensors"
    )


# Readers


def read_media(folder: Path, random: np.random.Generator) -> None:
    """Ground in it, play it, and let the server inspect it."""
    from bridge_stg.runtime.video.playback import play
    from bridge_stg.server.http.errors import ApiError
    from bridge_stg.server.settings import Settings
    from bridge_stg.server.videos.isolated import IsolatedMedia

    (path,) = folder.iterdir()
    if random.random() < 0.5:
        try:
            IsolatedMedia(str(path), Settings().media_limits).probe(path.name)
        except ApiError as error:
            assert error.status_code in (413, 415, 422), error
    if random.random() < 0.3:
        with play(path) as source:
            source.frames_at([0.0, 1.0])
    with fake_grounder() as grounder:
        grounder.ground(path, "the car", deadline_s=25)


def read_bundle(folder: Path, random: np.random.Generator) -> None:
    """Load it as if its list of sizes and hashes had been written after the damage, and ground in a small video."""
    from bridge_stg.runtime import Grounder
    from bridge_stg.runtime.bundle.bundle import Bundle
    from bridge_stg.runtime.parity.verify import verify_bundle

    if random.random() < 0.3:
        Bundle.load(folder, check="all")
    relist(folder)
    if random.random() < 0.3:
        verify_bundle(folder, backend="onnxruntime", threads=1)
    with Grounder.load(folder, backend="onnxruntime", threads=1) as grounder:
        frames = [(i / 4, frame) for i, frame in enumerate(pictures(6))]
        grounder.ground(iter(frames), "the white dog", deadline_s=25)


def relist(folder: Path) -> None:
    """Write the present sizes and hashes of a bundle's files into its manifest, if that can be parsed."""
    from bridge_stg.runtime.bundle.manifest import canonical_sha256

    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        entries = [manifest]
        while entries:
            entry = entries.pop()
            entries += [
                part for part in (entry.values() if isinstance(entry, dict) else entry) if isinstance(part, dict | list)
            ]
            if isinstance(entry, dict) and {"size", "sha256"} <= set(entry):
                data = (folder / entry.get("path", entry.get("file"))).read_bytes()
                entry["size"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
        manifest["fingerprint"] = canonical_sha256(manifest, without="fingerprint")
        path.write_text(json.dumps(manifest))
    except (ValueError, TypeError, AttributeError, OSError, RecursionError):
        return


def read_checkpoint(folder: Path, _: np.random.Generator) -> None:
    """Load model, adapter and tokenizer."""
    from bridge_stg.checkpoint.checkpoint import load_checkpoint, load_tokenizer
    from bridge_stg.model.config import BridgeSTGConfig

    load_checkpoint(folder)
    load_tokenizer(folder, BridgeSTGConfig.load(folder))


def read_annotations(folder: Path, _: np.random.Generator) -> None:
    """Read samples and their truth."""
    from bridge_stg.evaluation.datasets.registry import read_dataset

    about = json.loads((folder / "about").read_text())
    places = [folder / place for place in about["places"]]
    for sample in read_dataset(about["name"], places, folder, split=about["split"]).samples[:20]:
        sample.read_truth()


def read_text(folder: Path, _: np.random.Generator) -> None:
    """Read a table of queries, overrides or profiles, or results."""
    from bridge_stg.calibration.overrides import read_overrides
    from bridge_stg.evaluation.run.queries import read_queries
    from bridge_stg.evaluation.run.results import read_results
    from bridge_stg.export.engines import profiles

    (path,) = folder.iterdir()
    kind = folder.name
    if kind.startswith("queries"):
        read_queries(path)
    elif kind == "overrides":
        read_overrides(path)
    elif kind == "profiles":
        profiles.read_overrides(path)
    else:
        read_results(path, {"bundle": "x"})


class Requests:
    """Sends bodies to a server over fakes, which starts with the first one."""

    def __init__(self) -> None:
        self._running: Any = None
        self._video = ""

    def send(self, folder: Path, random: np.random.Generator) -> None:
        """Post the file to the routes that take its type."""
        from tests.bridge_stg.server.conftest import Running, ended

        if self._running is None:
            self._running = Running(fake_grounder())
        with self._running.client() as client:
            if not self._video:
                png = io.BytesIO()
                Image.fromarray(pictures(1)[0]).save(png, "PNG")
                self._video = client.post("/v1/videos", files={"file": png.getvalue()}).json()["id"]
            (path,) = folder.iterdir()
            json_body = path.suffix == ".json"
            body = path.read_bytes().replace(b"VIDEO", self._video.encode())
            routes = ("/v1/jobs", "/v1/ground", "/v1/videos") if json_body else ("/v1/videos", "/v1/ground")
            kind = "application/json" if json_body else "multipart/form-data; boundary=b"
            answer = client.post(routes[random.integers(len(routes))], content=body, headers={"Content-Type": kind})
            assert answer.status_code < 500, answer.text
            if answer.status_code == 202:
                ended(client, answer.json()["id"])


def read_array(_: Path, random: np.random.Generator) -> None:
    """Hand an array of any type and shape to the API."""
    with suppress(BridgeError), fake_grounder() as grounder:
        grounder.ground(any_array(random), "the car", deadline_s=25)


def read_stream(_: Path, random: np.random.Generator) -> None:
    """Hand frames to the API, one of which, or its time, is of another kind."""
    frames: list[Any] = [(i / 4, frame) for i, frame in enumerate(pictures(6))]
    times = (float("nan"), -1, 1e300, 2**70, "1", None, True, 0, 1e-300, np.float32(9), np.array([1, 2]))
    place = random.integers(len(frames))
    if random.random() < 0.5:
        frames[place] = (times[random.integers(len(times))], frames[place][1])
    elif random.random() < 0.8:
        frames[place] = (frames[place][0], any_array(random))
    else:
        frames[place] = (None, 5, frames[place][1], (1,))[random.integers(4)]
    with suppress(BridgeError), fake_grounder() as grounder:
        grounder.ground(iter(frames), "the car", deadline_s=25)


def any_array(random: np.random.Generator) -> Any:
    """Return an array, or something like one."""
    dtypes = ("u1", "u1", "u1", "i1", "f4", "f8", "c16", "?", "O", "U3", "M8[s]", "u2")
    shapes = (
        (48, 64, 3),
        (48, 64),
        (48, 64, 4),
        (0, 4, 3),
        (1, 1, 3),
        (1, 300, 3),
        (2, 48, 64, 3),
        (),
        (3,),
        (5000, 9, 3),
    )
    made = np.zeros(shapes[random.integers(len(shapes))], dtypes[random.integers(len(dtypes))])
    kind = random.integers(8)
    if kind == 0:
        return made[::-1, ..., ::-1] if made.ndim > 1 else made
    if kind == 1:
        return made.tolist()
    if kind == 2:
        return np.ma.masked_array(made)
    return made


REQUESTS = Requests()


def kinds(root: Path) -> dict[str, Kind]:
    """Return every kind of a folder of intact files."""
    found: dict[str, Kind] = {}
    for folder in sorted(root.iterdir()):
        name = folder.name
        if name == "bundle":
            for part in ("manifest.json", "graphs/**/*.onnx", "tokenizer.json", "golden/**/*.*", "reports/**/*.*"):
                found[f"bundle:{part}"] = Kind(part, read_bundle)
        elif name == "checkpoint":
            for part in ("config.json", "*.safetensors", "tokenizer.json", "adapter/*"):
                found[f"checkpoint:{part}"] = Kind(part, read_checkpoint)
        elif name.startswith("dataset-"):
            found[name] = Kind("**/*.*", read_annotations)
        elif name.startswith("request-"):
            found[name] = Kind("*", REQUESTS.send)
        elif name in ("array", "stream"):
            found[name] = Kind("*", read_array if name == "array" else read_stream)
        elif name.split("-")[0] in ("queries", "overrides", "profiles", "results"):
            found[name] = Kind("*", read_text)
        else:
            found[name] = Kind("*", read_media)
    return found

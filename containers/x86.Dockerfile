# Server with an NVIDIA GPU (x86-64): TensorRT from wheels, onnxruntime on the CPU beside it.
# Build from the repository: docker build -f containers/x86.Dockerfile -t bridge-stg:x86 .
# Run without a network:     docker run --rm --network none --gpus all -v $PWD/bundle:/bundle bridge-stg:x86 verify /bundle

# The CUDA runtime's smallest image: TensorRT's wheels bring their own libraries, the driver comes from the host.
# Ubuntu 24.04 has Python 3.12, for which every pin in constraints.txt has a wheel.
FROM nvcr.io/nvidia/cuda:13.0.1-base-ubuntu24.04

# Python alone; PyAV's wheel holds FFmpeg, so no program for video is installed. Lists are dropped in the same layer.
RUN apt-get update && apt-get install -y --no-install-recommends python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

# A venv, since Ubuntu's own Python refuses pip (PEP 668).
RUN python3.12 -m venv /opt/bridge-stg

# What the wheel is made of, and nothing else: changes elsewhere do not rebuild this layer.
COPY pyproject.toml setup.py README.md LICENSE constraints.txt /src/
COPY bridge_stg /src/bridge_stg
COPY runtime /src/runtime
COPY export /src/export
COPY calibration /src/calibration
COPY evaluation /src/evaluation

# TensorRT runs engines; `calibrate` brings onnx, by which `build` and `verify --bisect` read graphs; `cpu` is what results
# are compared with; `serve` is the HTTP server. Constraints make it the very versions that the tests ran with. The sources go in the same layer.
RUN /opt/bridge-stg/bin/pip install --no-cache-dir -c /src/constraints.txt "/src[cpu,tensorrt,calibrate,serve]" && rm -rf /src

# Engines for bundles that are mounted read-only go here; mount a volume to keep them.
ENV XDG_CACHE_HOME=/cache

# compute: CUDA; utility: nvidia-smi. No display, no video decoder.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

# A user without rights; the cache folder is its own.
RUN useradd --create-home --uid 10001 bridge && install -d -o bridge /cache
USER bridge

# `docker run … doctor` says what the container sees of the machine.
ENTRYPOINT ["/opt/bridge-stg/bin/bridge-stg"]
CMD ["doctor"]

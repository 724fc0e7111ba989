# Server with an NVIDIA GPU (x86-64): TensorRT from wheels, and onnxruntime on the CPU.
# Build from the repository: docker build -f containers/x86.Dockerfile -t bridge-stg:x86 .
# Run without a network:     docker run --rm --network none --gpus all -v $PWD/bundle:/bundle bridge-stg:x86 verify /bundle

# The CUDA runtime's smallest image: TensorRT's wheels bring their own libraries, the driver comes from the host.
# Ubuntu 24.04 has Python 3.12, for which every pin in constraints.txt has a wheel.
FROM nvcr.io/nvidia/cuda:13.0.1-base-ubuntu24.04

# Only Python; PyAV's wheel contains FFmpeg. The package lists are removed in the same layer.
RUN apt-get update && apt-get install -y --no-install-recommends python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

# A venv, since pip cannot install into Ubuntu's system Python (PEP 668).
RUN python3.12 -m venv /opt/bridge-stg

# Only the files that go into the wheel: other changes do not rebuild this layer.
COPY pyproject.toml setup.py README.md LICENSE constraints.txt /src/
COPY bridge_stg /src/bridge_stg
COPY runtime /src/runtime
COPY export /src/export
COPY calibration /src/calibration
COPY evaluation /src/evaluation

# TensorRT runs engines; `calibrate` installs onnx, which `build` and `verify --bisect` need; `cpu` is the reference backend;
# `serve` is the HTTP server. The constraints are the versions that the tests ran with. The sources are removed in the same layer.
RUN /opt/bridge-stg/bin/pip install --no-cache-dir -c /src/constraints.txt "/src[cpu,tensorrt,calibrate,serve]" && rm -rf /src

# Engines of read-only bundles are stored here; mount a volume to keep them.
ENV XDG_CACHE_HOME=/cache

# The weights of onnxruntime lie in pages of 2 MB where the host offers them (docs/performance.md).
ENV GLIBC_TUNABLES=glibc.malloc.hugetlb=1

# compute: CUDA; utility: nvidia-smi. No display, no video decoder.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

# An unprivileged user, who owns the cache folder.
RUN useradd --create-home --uid 10001 bridge && install -d -o bridge /cache
USER bridge

# `docker run … doctor` reports which devices and packages the container has.
ENTRYPOINT ["/opt/bridge-stg/bin/bridge-stg"]
CMD ["doctor"]

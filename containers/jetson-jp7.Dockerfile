# Jetson Thor, and Orin with a JetPack 7 that supports it: runs software for Arm servers, so TensorRT comes from wheels.
# Build on the device: docker build -f containers/jetson-jp7.Dockerfile -t bridge-stg:jp7 .
# Run without network: docker run --rm --network none --runtime nvidia -v $PWD/bundle:/bundle bridge-stg:jp7 verify /bundle

# The servers' image in its Arm (SBSA) edition: JetPack 7 has CUDA 13 and needs no separate image.
FROM nvcr.io/nvidia/cuda:13.0.1-base-ubuntu24.04

# Only Python; PyAV's wheel contains FFmpeg.
RUN apt-get update && apt-get install -y --no-install-recommends python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

# A venv, since pip cannot install into Ubuntu's system Python (PEP 668).
RUN python3.12 -m venv /opt/bridge-stg

# Only the files that go into the wheel.
COPY pyproject.toml setup.py README.md LICENSE constraints.txt /src/
COPY bridge_stg /src/bridge_stg
COPY runtime /src/runtime
COPY export /src/export
COPY calibration /src/calibration
COPY evaluation /src/evaluation

# TensorRT 10.15 and later run `standard`, which updates the cache in place; the tests ran with these versions.
RUN /opt/bridge-stg/bin/pip install --no-cache-dir -c /src/constraints.txt "/src[cpu,tensorrt,calibrate]" && rm -rf /src

# Engines of read-only bundles are stored here; mount a volume to keep them.
ENV XDG_CACHE_HOME=/cache
RUN install -d -m 1777 /cache

# Run as root: Jetson's device files belong to the group `video`, whose id differs between releases.
ENTRYPOINT ["/opt/bridge-stg/bin/bridge-stg"]
CMD ["doctor"]

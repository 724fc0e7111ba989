# Jetson Thor, and Orin with a JetPack 7 that supports it: an Arm server to software, so TensorRT comes from wheels.
# Build on the device: docker build -f containers/jetson-jp7.Dockerfile -t bridge-stg:jp7 .
# Run without network: docker run --rm --network none --runtime nvidia -v $PWD/bundle:/bundle bridge-stg:jp7 verify /bundle

# The same image as on servers, in its Arm (SBSA) edition: JetPack 7 has CUDA 13 and needs no image of its own.
FROM nvcr.io/nvidia/cuda:13.0.1-base-ubuntu24.04

# Python alone; PyAV's wheel holds FFmpeg.
RUN apt-get update && apt-get install -y --no-install-recommends python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

# A venv, since Ubuntu's own Python refuses pip (PEP 668).
RUN python3.12 -m venv /opt/bridge-stg

# What the wheel is made of, and nothing else.
COPY pyproject.toml setup.py README.md LICENSE constraints.txt /src/
COPY bridge_stg /src/bridge_stg
COPY runtime /src/runtime
COPY export /src/export
COPY calibration /src/calibration
COPY evaluation /src/evaluation

# TensorRT 10.15 and later run `standard`, with the cache updated in place; versions are those that the tests ran with.
RUN /opt/bridge-stg/bin/pip install --no-cache-dir -c /src/constraints.txt "/src[cpu,tensorrt,calibrate]" && rm -rf /src

# Engines for bundles that are mounted read-only go here; mount a volume to keep them.
ENV XDG_CACHE_HOME=/cache
RUN install -d -m 1777 /cache

# The container's user is root: Jetson's device files belong to the group `video`, whose number differs by release.
ENTRYPOINT ["/opt/bridge-stg/bin/bridge-stg"]
CMD ["doctor"]

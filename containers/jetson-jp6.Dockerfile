# Jetson Orin with JetPack 6.1 or later (Jetson Linux 36.4 and later): JetPack's TensorRT 10.3, which runs the variant `primitive`.
# Build on the device: docker build -f containers/jetson-jp6.Dockerfile -t bridge-stg:jp6 .
# Run without network: docker run --rm --network none --runtime nvidia -v $PWD/bundle:/bundle bridge-stg:jp6 verify /bundle

# JetPack 6.1's image contains CUDA 12.6 and TensorRT 10.3 with its Python package; it also runs on later 6.x.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

# Ubuntu 22.04's Python 3.10, for which JetPack's TensorRT package is built.
RUN apt-get update && apt-get install -y --no-install-recommends python3.10 python3.10-venv \
    && rm -rf /var/lib/apt/lists/*

# A venv with access to the system's packages: `tensorrt` is one of them, and no wheel of it exists for JetPack 6.
RUN python3.10 -m venv --system-site-packages /opt/bridge-stg

# Only the files that go into the wheel.
COPY pyproject.toml setup.py README.md LICENSE /src/
COPY bridge_stg /src/bridge_stg
COPY runtime /src/runtime
COPY export /src/export
COPY calibration /src/calibration
COPY evaluation /src/evaluation

# Ubuntu 22.04's setuptools is too old to build this project; a current pip builds in isolation with a newer one.
RUN /opt/bridge-stg/bin/pip install --no-cache-dir --upgrade pip

# constraints.txt is for Python 3.11 and later; here pip chooses within the ranges. `jetpack6` installs the cuda-python
# and NVRTC of CUDA 12.6, which is JetPack 6's; `calibrate` installs onnx, which `build` and `verify --bisect` need.
RUN /opt/bridge-stg/bin/pip install --no-cache-dir "/src[cpu,jetpack6,calibrate]" && rm -rf /src

# Engines of read-only bundles are stored here; mount a volume to keep them.
ENV XDG_CACHE_HOME=/cache
RUN install -d -m 1777 /cache

# Run as root: Jetson's device files belong to the group `video`, whose id differs between releases.
ENTRYPOINT ["/opt/bridge-stg/bin/bridge-stg"]
CMD ["doctor"]

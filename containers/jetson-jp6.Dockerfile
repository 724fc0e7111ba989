# Jetson Orin with JetPack 6.1 or later (Jetson Linux 36.4 and later): JetPack's own TensorRT 10.3, so graphs in `primitive`.
# Build on the device: docker build -f containers/jetson-jp6.Dockerfile -t bridge-stg:jp6 .
# Run without network: docker run --rm --network none --runtime nvidia -v $PWD/bundle:/bundle bridge-stg:jp6 verify /bundle

# JetPack 6.1's image holds CUDA 12.6 and TensorRT 10.3 with its Python package; it runs on later 6.x too.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

# Ubuntu 22.04's Python 3.10, for which JetPack's TensorRT package is made.
RUN apt-get update && apt-get install -y --no-install-recommends python3.10 python3.10-venv \
    && rm -rf /var/lib/apt/lists/*

# A venv that sees the system's packages: `tensorrt` lies there, and no wheel of it exists for JetPack 6.
RUN python3.10 -m venv --system-site-packages /opt/bridge-stg

# What the wheel is made of, and nothing else.
COPY pyproject.toml setup.py README.md LICENSE /src/
COPY bridge_stg /src/bridge_stg
COPY runtime /src/runtime
COPY export /src/export
COPY calibration /src/calibration
COPY evaluation /src/evaluation

# setuptools of Ubuntu 22.04 is older than this project's build needs; an up-to-date pip builds apart with its own.
RUN /opt/bridge-stg/bin/pip install --no-cache-dir --upgrade pip

# constraints.txt is for Python 3.11 and later; here pip chooses within the ranges. cuda-python 13 needs a driver of
# CUDA 13; JetPack 6 has 12.6. `calibrate` brings onnx, by which `build` and `verify --bisect` read graphs.
RUN /opt/bridge-stg/bin/pip install --no-cache-dir "/src[cpu,calibrate]" "cuda-python>=12.6.2,<13" && rm -rf /src

# Engines for bundles that are mounted read-only go here; mount a volume to keep them.
ENV XDG_CACHE_HOME=/cache
RUN install -d -m 1777 /cache

# The container's user is root: Jetson's device files belong to the group `video`, whose number differs by release.
ENTRYPOINT ["/opt/bridge-stg/bin/bridge-stg"]
CMD ["doctor"]

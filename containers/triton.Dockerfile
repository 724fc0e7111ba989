# Triton Inference Server with the Python packages that the model of `bridge-stg triton` needs.
# Build from the repository: docker build -f containers/triton.Dockerfile -t bridge-stg:triton .
# Run: docker run --rm --gpus all --shm-size 1g -p 8000-8002:8000-8002 -v $PWD/repo:/models:ro -v $PWD/videos:/videos:ro bridge-stg:triton

# Since 24.11 this image has Python 3.12, the only version that its Python backend supports.
FROM nvcr.io/nvidia/tritonserver:25.12-py3

# Only the files that go into the wheel.
COPY pyproject.toml setup.py README.md LICENSE constraints.txt /src/
COPY bridge_stg /src/bridge_stg
COPY runtime /src/runtime
COPY export /src/export
COPY calibration /src/calibration
COPY evaluation /src/evaluation

# Install into the Python of the backend; cuda-python and TensorRT are for GPUs.
RUN pip install --no-cache-dir --break-system-packages -c /src/constraints.txt "/src[cpu,tensorrt]" && rm -rf /src

# Engines of bundles in a read-only repository are stored here.
ENV XDG_CACHE_HOME=/cache
RUN install -d -m 1777 /cache

# The image's entry point starts this command.
CMD ["tritonserver", "--model-repository=/models"]

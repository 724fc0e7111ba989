# Triton Inference Server with what `bridge-stg triton` needs in its Python.
# Build from the repository: docker build -f containers/triton.Dockerfile -t bridge-stg:triton .
# Run: docker run --rm --gpus all --shm-size 1g -p 8000-8002:8000-8002 -v $PWD/repo:/models:ro -v $PWD/videos:/videos:ro bridge-stg:triton

# Since 24.11 this image has Python 3.12; the stub of its Python backend is made for that one and loads no other.
FROM nvcr.io/nvidia/tritonserver:25.12-py3

# What the wheel is made of, and nothing else.
COPY pyproject.toml setup.py README.md LICENSE constraints.txt /src/
COPY bridge_stg /src/bridge_stg
COPY runtime /src/runtime
COPY export /src/export
COPY calibration /src/calibration
COPY evaluation /src/evaluation

# Into the Python that the stub runs. cuda-python and TensorRT make it fit for GPUs.
RUN pip install --no-cache-dir --break-system-packages -c /src/constraints.txt "/src[cpu,tensorrt]" && rm -rf /src

# Engines for bundles in a repository that is mounted read-only go here.
ENV XDG_CACHE_HOME=/cache
RUN install -d -m 1777 /cache

# The server's own entry point stays, and starts this.
CMD ["tritonserver", "--model-repository=/models"]

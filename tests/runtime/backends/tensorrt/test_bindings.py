"""The names of TensorRT's and CUDA's bindings that the code uses: those that the supported versions have.

They were looked up in the bindings of TensorRT 10.3.0 (JetPack 6) and 11.4.0, and in cuda-bindings 12.9.4 and 13.4.4. A
name that is new in the code belongs in these tables once it has been looked up in the same packages.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
EVERYWHERE = """
    BOOL Builder BuilderFlag DETAILED DEVICE ERROR ExecutionContextAllocationStrategy FLOAT HALF ILogger
    INPUT INT32 INT64 INT8 INTERNAL_ERROR IProgressMonitor JSON LayerInformationFormat LayerType MemoryPoolType
    NetworkDefinitionCreationFlag OUTPUT OnnxParser ProfilingVerbosity Runtime STRONGLY_TYPED TF32 TensorIOMode
    TensorLocation UINT8 USER_MANAGED WORKSPACE Weights add_optimization_profile build_serialized_network clear_flag
    create_builder_config create_engine_inspector create_execution_context create_network create_optimization_profile
    create_timing_cache deserialize_cuda_engine execute_async_v3 get_device_memory_size_for_profile_v2
    get_dimension_name get_engine_information get_error get_input get_layer get_tensor_dtype get_tensor_location
    get_tensor_mode get_tensor_name get_tensor_profile_shape get_tensor_shape get_timing_cache infer_shapes node_name
    node_operator num_errors num_inputs num_io_tensors num_layers num_optimization_profiles profiling_verbosity
    progress_monitor set_device_memory set_input_shape set_memory_pool_limit set_optimization_profile_async set_shape
    set_tensor_address set_timing_cache
"""
LATER = """
    ATTENTION_OUTPUT CUR END IAttentionOutputLayer IStreamReaderV2 SET SeekPosition create_runtime_config
    get_aliased_input_tensor set_execution_context_allocation_strategy
"""
"""In 11.4, not in 10.3: used where they exist, or with TensorRT-RTX only."""
ONLY_RTX = """
    ComputeCapability CudaGraphStrategy WHOLE_GRAPH_CAPTURE create_runtime_cache cuda_graph_strategy device_memory
    is_stream_capturable num_compute_capabilities set_compute_capability set_runtime_cache
"""
"""Not in native TensorRT 11.4: used where they exist, or with TensorRT-RTX only."""
CUDA = {
    "cudaDeviceSynchronize": 0,
    "cudaEventCreateWithFlags": 1, "cudaEventDestroy": 1, "cudaEventQuery": 1, "cudaEventRecord": 2,
    "cudaEventSynchronize": 1, "cudaFree": 1, "cudaFreeHost": 1, "cudaGetDeviceCount": 0, "cudaGetDeviceProperties": 1,
    "cudaGetErrorString": 1, "cudaGraphDestroy": 1, "cudaGraphExecDestroy": 1, "cudaGraphInstantiate": 2,
    "cudaGraphLaunch": 2, "cudaHostAlloc": 2, "cudaMalloc": 1, "cudaMemGetInfo": 0, "cudaMemcpy2DAsync": 8,
    "cudaMemcpyAsync": 5, "cudaMemsetAsync": 4, "cudaRuntimeGetVersion": 0, "cudaSetDevice": 1,
    "cudaStreamBeginCapture": 2, "cudaStreamCreateWithFlags": 1, "cudaStreamDestroy": 1, "cudaStreamEndCapture": 1,
    "cudaStreamSynchronize": 1, "cudaStreamWaitEvent": 3, "cuLaunchKernel": 11, "cuModuleGetFunction": 2,
    "cuModuleLoadData": 1, "nvrtcCompileProgram": 3, "nvrtcCreateProgram": 5, "nvrtcDestroyProgram": 1,
    "nvrtcGetCUBIN": 2, "nvrtcGetCUBINSize": 1, "nvrtcGetProgramLog": 2, "nvrtcGetProgramLogSize": 1,
}  # fmt: skip
"""Number of parameters of each function, the same in 12.9.4 and 13.4.4."""
CUDA_VALUES = """
    cudaErrorMemoryAllocation cudaError_t cudaEventDisableTiming cudaHostAllocDefault
    cudaMemcpyDeviceToDevice cudaMemcpyDeviceToHost cudaMemcpyHostToDevice cudaMemcpyKind cudaStreamCaptureMode
    cudaStreamCaptureModeThreadLocal cudaStreamNonBlocking cudaSuccess cudaErrorInsufficientDriver
"""


def test_names_of_tensorrt() -> None:
    rtx = pytest.importorskip("tensorrt_rtx_bindings", reason='no TensorRT-RTX here: pip install -e ".[rtx]"')
    values = {name: getattr(rtx, name) for name in dir(rtx)}
    surface = {*values, *(name for one in values.values() if inspect.isclass(one) for name in dir(one))}
    folders = (ROOT / "runtime" / "backends" / "tensorrt", ROOT / "export" / "engines")
    used: set[str] = set()
    for node in (node for folder in folders for file in folder.glob("*.py") for node in ast.walk(_tree(file))):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # of getattr
            used.add(node.value)
    ours = {"tensorrt_rtx"}
    known = {*EVERYWHERE.split(), *LATER.split(), *ONLY_RTX.split()}
    assert {name for name in (used & surface) - ours if re.search("(?!^)_|[A-Z]", name) and name[0] != "_"} == known


def test_functions_of_cuda() -> None:
    modules = [
        pytest.importorskip(f"cuda.bindings.{name}", reason='no cuda-python here: pip install -e ".[rtx]"')
        for name in ("runtime", "driver", "nvrtc")
    ]
    folders = (ROOT / "runtime" / "device", ROOT / "runtime" / "backends" / "tensorrt")
    text = "".join(file.read_text(encoding="utf-8") for folder in folders for file in folder.glob("*.py"))
    names = set(re.findall(r"\b(?:cuda[A-Z]\w+|nvrtc[A-Z]\w+|cuModule\w+|cuLaunch\w+)\b", text))
    assert names == {*CUDA, *CUDA_VALUES.split()}
    for name, count in CUDA.items():
        (function,) = [getattr(module, name) for module in modules if hasattr(module, name)]
        parameters = re.match(rf"{name}\((.*)\)", function.__doc__ or "")
        assert parameters is not None
        given = re.sub(r"\[.*?\]", "", parameters[1])
        assert len([one for one in given.split(",") if one.strip()]) == count, name


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))

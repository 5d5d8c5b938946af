"""Engines of TensorRT for RTX at run time: buffers that stay where they are, and CUDA graphs that are replayed."""

from __future__ import annotations

import atexit
import logging
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from faceage.engines import ort
from faceage.engines.base import BATCH, Axis, Program
from faceage.engines.kept import keep, read_kept
from faceage.errors import EngineError, UnfitEngineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_SIZE = 2048
"""Largest size of an axis in a profile: TensorRT's tensors have less than 2^31 elements, at all sizes at once."""


@cache
def rtx() -> tuple[Any, Any]:
    """Return the module and its logger: a process has one, and TensorRT warns of a second."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            logger.debug("TensorRT: %s", message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last_error = message

    return trt, Log()


class RtxEngine:
    """An engine of TensorRT for RTX as a function of CUDA tensors.

    Batches are padded to 1, 2, 4, 8 ... faces. Each of these sizes has an execution context and buffers of its own,
    whose addresses never change: so TensorRT captures one CUDA graph for each on its second run and replays it from
    then on. A network that takes pictures of any size has one context and no graphs: it would capture all the time.
    What TensorRT compiles on the GPU is kept beside the engine, in a `.cache` file.
    """

    def __init__(self, program: Program, path: Path, device: torch.device) -> None:
        """Open the engine at `path`.

        Raises:
            UnfitEngineError: if it is for another GPU or driver.
            EngineError: if it is damaged.
        """
        import torch

        trt, log = rtx()
        self._program = program
        self._device = device
        self._lock = Lock()  # an execution context is for one call at a time
        self._contexts: dict[int, _Context] = {}
        self._cache_file = path.with_suffix(".cache")
        axes = {axis for spec in program.inputs for axis in spec.shape if isinstance(axis, Axis)}
        self._batch = next((axis for axis in axes if axis.name == BATCH.name), None) if len(axes) == 1 else None
        data = path.read_bytes()
        with torch.cuda.device(device):
            self._runtime = trt.Runtime(log)
            validity, diagnostics = self._runtime.get_engine_validity(data)
            if validity == trt.EngineValidity.INVALID:
                found = trt.EngineInvalidityDiagnostics.__members__.items()
                reasons = [name.lower().replace("_", " ") for name, bit in found if int(diagnostics) & int(bit)]
                error = EngineError if "malformed engine" in reasons else UnfitEngineError
                raise error(
                    f"TensorRT for RTX cannot run {path.name} on {torch.cuda.get_device_name(device)} "
                    f"({', '.join(reasons)}); use --backend aotinductor, or update the driver"
                )
            self._engine = self._runtime.deserialize_cuda_engine(data)
            if self._engine is None:
                raise EngineError(f"TensorRT for RTX cannot open {path.name}: {log.last_error}")
            self._config = self._engine.create_runtime_config()
            graphs = trt.CudaGraphStrategy
            self._config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if self._batch else graphs.DISABLED
            allocation = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            self._config.set_execution_context_allocation_strategy(allocation)
            self._cache = self._config.create_runtime_cache()
            if kept := read_kept(self._cache_file):
                self._cache.deserialize(kept)  # it refuses that of another GPU or driver
            self._config.set_runtime_cache(self._cache)
            self._stream = torch.cuda.Stream(device)
        atexit.register(self._keep_cache)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the network; inputs and outputs lie on the GPU."""
        import torch

        caller = torch.cuda.current_stream(self._device)
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(caller)
            context, count = self._context_for(inputs)
            for spec, buffer, value in zip(self._program.inputs, context.inputs, inputs, strict=True):
                (buffer[:count] if self._batch in spec.shape else buffer).copy_(value)
            if not context.run(self._stream.cuda_stream):
                raise EngineError(f"{self._program.name}: TensorRT failed ({rtx()[1].last_error}); use --device cpu")
            # The buffers are the next call's too.
            results = tuple(
                (buffer[:count] if self._batch in spec.shape else buffer).clone()
                for spec, buffer in zip(self._program.outputs, context.outputs, strict=True)
            )
        caller.wait_stream(self._stream)
        for result in results:
            result.record_stream(caller)
        return results

    def _context_for(self, inputs: tuple[Tensor, ...]) -> tuple[_Context, int]:
        """Return the context that takes the inputs, its shapes set, and how many of its rows they fill."""
        if self._batch is None:
            if 0 not in self._contexts:
                self._contexts[0] = _Context(self._program, self._engine, self._config, self._device)
            self._contexts[0].bind([tuple(value.shape) for value in inputs])
            return self._contexts[0], len(inputs[0])
        sizes = {
            value.shape[spec.shape.index(self._batch)]
            for spec, value in zip(self._program.inputs, inputs, strict=True)
            if self._batch in spec.shape
        }
        (count,) = sizes
        bucket = max(self._batch.min, min(1 << (count - 1).bit_length(), self._batch.max, MAX_SIZE))
        if count > bucket:
            raise EngineError(
                f"{self._program.name}: {count} faces at once, at most {bucket} are possible; report this"
            )
        if bucket not in self._contexts:
            context = _Context(self._program, self._engine, self._config, self._device)
            context.bind([
                tuple(bucket if axis == self._batch else axis for axis in spec.shape) for spec in self._program.inputs
            ])  # fmt: skip
            self._contexts[bucket] = context
        return self._contexts[bucket], count

    def _keep_cache(self) -> None:
        """Write what was compiled on the GPU, for the next process."""
        if self._cache_file.parent.is_dir():  # a draft's is gone when it has been compared
            keep(self._cache_file, bytes(self._cache.serialize()))


class _Context:
    """An execution context with its buffers."""

    def __init__(self, program: Program, engine: Any, config: Any, device: torch.device) -> None:
        self._program, self._device = program, device
        self._context = engine.create_execution_context(config)
        if self._context is None:
            raise EngineError(f"{program.name}: TensorRT has no execution context ({rtx()[1].last_error})")
        self._shapes: list[Any] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._workspace: Tensor | None = None

    def bind(self, shapes: list[Any]) -> None:
        """Set the inputs' shapes, and allocate what they take, unless they are those from before."""
        import torch

        if shapes == self._shapes:
            return
        names = [ort.INPUT_PREFIX + spec.name for spec in self._program.inputs]
        for name, shape in zip(names, shapes, strict=True):
            if not self._context.set_input_shape(name, shape):
                raise EngineError(
                    f"{self._program.name}: {name} of {shape} is outside the engine's range (axes up to {MAX_SIZE}); "
                    "use --device cpu for such pictures"
                )
        # Rows that no face fills are computed too: not on what happened to be in memory.
        self.inputs = [torch.zeros(shape, device=self._device) for shape in shapes]
        outputs = [ort.OUTPUT_PREFIX + spec.name for spec in self._program.outputs]
        self.outputs = [
            torch.empty(tuple(self._context.get_tensor_shape(name)), device=self._device) for name in outputs
        ]
        for name, buffer in zip((*names, *outputs), (*self.inputs, *self.outputs), strict=True):
            self._context.set_tensor_address(name, buffer.data_ptr())
        size = self._context.update_device_memory_size_for_shapes()
        self._workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=self._device)
        self._context.set_device_memory(self._workspace.data_ptr(), size)
        self._shapes = shapes

    def run(self, stream: int) -> bool:
        """Enqueue the network; return whether that worked."""
        return bool(self._context.execute_async_v3(stream))

"""Compiled networks: a program (how to make a network) becomes an engine (how to run it) through a backend.

`EngineStore.load` is the way in, with a `Runtime` that `registry.choose_runtime` finds. Each backend has its file:
`openvino`, `ort` (ONNX Runtime), `tensorrt` (TensorRT for RTX and Torch-TensorRT), `aotinductor`, `eager` (torch).
"""

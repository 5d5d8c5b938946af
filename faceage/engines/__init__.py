"""Compiled networks: a program (how to make a network) becomes an engine (how to run it) through a backend.

`EngineStore.load` is the way in. Each backend has its file: `ort` (ONNX Runtime), `eager` (torch itself).
"""

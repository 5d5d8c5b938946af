"""A stand-in for a GPU's streams, on which tensors of the CPU are followed: who reads what before it can be there?"""

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import torch
import torch.utils.dlpack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from faceage.kernels import streams


class RaceError(AssertionError):
    """A stream reads what another one may not have written yet."""


class Stream:
    def __init__(self, device=None):
        self.asked = 0
        """How much was asked of it."""
        self.after = {}
        """Stream -> how much of what was asked of it is done before what is asked of this one from now on."""

    def wait_event(self, event):
        for stream, asked in event.after.items():
            self.after[stream] = max(self.after.get(stream, 0), asked)

    def synchronize(self):
        Event().record(self).synchronize()


class Event:
    done: ClassVar[dict] = {}
    """Stream -> how much of what was asked of it the host has waited for."""

    def record(self, stream):
        self.after = {**stream.after, stream: stream.asked}
        return self

    def synchronize(self):
        for stream, asked in self.after.items():
            Event.done[stream] = max(Event.done.get(stream, 0), asked)


class Follow(TorchDispatchMode):
    """Follows all operations of a thread, as asked of one stream."""

    def __init__(self, gpu, stream):
        super().__init__()
        self.gpu, self.stream = gpu, stream

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(each) if torch.is_tensor(t)] for each in ((args, kwargs), result))
        places = {memory_of(tensor) for tensor in read}
        if written and not operation._schema.is_mutable and all(memory_of(tensor) in places for tensor in written):
            return result  # a view reads nothing
        self.stream.asked += 1
        for tensor in read:
            self.gpu.check(tensor, self.stream, operation)
        for tensor in written:
            self.gpu.written[memory_of(tensor)] = self.stream, self.stream.asked
        return result


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr()


class GPU:
    """Takes the place of `torch.cuda`'s streams. "cuda:0" is a device whose tensors lie on the CPU."""

    def __init__(self, patch):
        self.default = Stream()
        self.used = set()
        self.written = {}
        """Address of a tensor's memory -> the stream that wrote it, and when."""
        self.recorded = []
        self._current = threading.local()
        Event.done.clear()
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "default_stream", lambda device: self.default)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current())
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.recorded.append(stream))
        patch.setattr(streams, "_own", threading.local())
        for module, name in ((torch, "from_numpy"), (torch.utils.dlpack, "from_dlpack")):
            patch.setattr(module, name, self._made_by_others(getattr(module, name)))

    def _made_by_others(self, make):
        def made(source):
            tensor = make(source)
            self.written.pop(memory_of(tensor), None)
            return tensor

        return made

    def current(self):
        return getattr(self._current, "stream", self.default)

    @contextmanager
    def stream(self, stream):
        before, self._current.stream = self.current(), stream
        self.used.add(stream)
        try:
            with Follow(self, stream):
                yield
        finally:
            self._current.stream = before

    def check(self, tensor, stream=None, operation="an encoder"):
        """Raise if a stream, or the host, reads a tensor that may not be there yet."""
        writer, when = self.written.get(memory_of(tensor), (stream, 0))
        known = 0 if stream is None else stream.after.get(writer, 0)
        if writer is not stream and max(known, Event.done.get(writer, 0)) < when:
            raise RaceError(f"{operation} reads a tensor {tuple(tensor.shape)} that another stream writes")

    def place(self, patch, *modules):
        """Let modules take tensors of the CPU for those of "cuda:0"."""
        there = [SimpleNamespace(device="cuda:0")]
        for module in modules:
            for name, stand_in in (
                ("computing", lambda device: streams.computing("cuda:0")),
                ("decoding", lambda device: streams.decoding("cuda:0")),
                ("ready_event", lambda planes, **options: streams.ready_event(there, **options)),
                ("settle", lambda tensor: self.current().synchronize() or tensor),
            ):
                if hasattr(module, name):
                    patch.setattr(module, name, stand_in)

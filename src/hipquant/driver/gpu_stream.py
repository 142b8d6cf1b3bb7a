"""Streams, events and graphs of a GPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import DriverError
from . import base
from . import gpu_symbols as symbols
from .base import Event
from .gpu_memory import Owned

if TYPE_CHECKING:
    from .gpu import Device


class Point(base.Point):
    """An event of the driver."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.event = device._make("create_event", 0, destroy="destroy_event", what="creating an event")

    def synchronize(self) -> None:
        self.device._call("synchronize_event", self.event.value, what="waiting for an event")

    def seconds_since(self, earlier: base.Point) -> float:
        if not isinstance(earlier, Point) or earlier.device is not self.device:
            raise ValueError("both events must have been recorded on the same device")
        self.synchronize()
        milliseconds = ctypes.c_float()
        events = earlier.event.value, self.event.value
        self.device._call("elapsed", ctypes.byref(milliseconds), *events, what="the time between two events")
        return milliseconds.value / 1e3


class Stream(base.Stream):
    """An order of launches and copies on a GPU; the caller goes on meanwhile."""

    def __init__(self, device: Device, owned: Owned | None, handle: int) -> None:
        self.device: Device = device
        self._owned, self.handle = owned, handle
        self._graph: Graph | None = None

    @classmethod
    def from_handle(cls, device: Device, handle: int) -> Stream:
        """A stream that somebody else owns, such as `torch.cuda.current_stream().cuda_stream`; 0 is the NULL stream."""
        return cls(device, None, handle)

    def synchronize(self) -> None:
        self.device._call("synchronize_stream", self.handle, what="waiting for a stream")

    def wait(self, event: Event) -> None:
        point = event._point
        if isinstance(point, Point) and point.device.kind == self.device.kind:
            self.device._call("wait_event", self.handle, point.event.value, 0, what="waiting for an event")
        else:
            event.synchronize()

    def _mark(self, previous: base.Point | None) -> Point:
        point = previous if isinstance(previous, Point) and previous.device is self.device else Point(self.device)
        self.device._call("record_event", point.event.value, self.handle, what="recording an event")
        return point

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        if self._graph is not None:
            raise RuntimeError("this stream is capturing a graph already")
        device, graph = self.device, Graph(self.device)
        begun, what = True, "beginning to capture a graph"
        try:
            try:
                device._call("begin_capture", self.handle, symbols.CAPTURE_RELAXED, what=what)
            except DriverError:
                begun = False  # and what somebody else captures must go on
                raise
            self._graph = graph
            yield graph
            captured = self._end_capture()
        except BaseException:
            if begun:
                with contextlib.suppress(DriverError):  # the capture must end; its result is of no use
                    self._end_capture()
            raise
        finally:
            self._graph = None
        graph.set(captured)

    def _end_capture(self) -> Owned:
        return self.device._make(
            "end_capture", self.handle, destroy="destroy_graph", what="capturing a graph", out_at=1
        )


class Graph(base.Graph):
    """A captured graph; the driver's instance of it is made when it is first launched."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self._graph: Owned | None = None
        self._instance: Owned | None = None

    def set(self, captured: Owned) -> None:
        self._graph = captured

    def _captured(self) -> Owned:
        if self._graph is None:
            raise RuntimeError("the graph is still being captured, or its capture failed")
        return self._graph

    def __len__(self) -> int:
        count = ctypes.c_size_t()
        self.device._call("graph_nodes", self._captured().value, None, ctypes.byref(count), what="counting the nodes")
        return count.value

    def instantiate(self) -> None:
        """Makes the driver's instance now, not at the first launch."""
        if self._instance is None:
            self._instance = self.device._make(
                "instantiate", self._captured().value, 0, destroy="destroy_instance", what="instantiating a graph"
            )

    def launch(self, stream: base.Stream) -> None:
        on = self.device._own(stream)
        self.instantiate()
        assert self._instance is not None
        self.device._call("launch_graph", self._instance.value, on.handle, what="launching a graph")

    def update(self, other: base.Graph) -> None:
        if not isinstance(other, Graph) or other.device is not self.device:
            raise TypeError(f"a graph of {self.device} cannot take over {other!r}")
        captured = other._captured()
        if self._instance is not None:
            node, result = ctypes.c_void_p(), ctypes.c_int()
            out = ctypes.byref(node), ctypes.byref(result)
            self.device._make_current()
            code = self.device.library.functions["update_graph"](self._instance.value, captured.value, *out)
            if code not in (0, symbols.NOT_UPDATABLE):
                raise self.device.library.error("update_graph", code, "updating a graph")
            if code or result.value:  # other nodes than before: a new instance
                self._instance = None
        self._graph, self.keep = captured, other.keep

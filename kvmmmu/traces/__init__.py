"""Reader of recorded runs: every access of a real kernel with its answer, in chunks of columns."""

from kvmmmu.traces.memory_map import MemoryArea
from kvmmmu.traces.reader import Chunk, Kind, Trace, bundled_trace, open_trace

__all__ = ["Chunk", "Kind", "MemoryArea", "Trace", "bundled_trace", "open_trace"]

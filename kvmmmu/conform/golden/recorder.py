"""The tracepoints of an operation in order: the model's own, and those of exits that the runner stands for."""

from __future__ import annotations

from kvmmmu.conform.golden.host import Host
from kvmmmu.vm import VM

__all__ = ["Recorder"]

_CAPACITY = 1 << 17


class Recorder:
    """Lines of text, taken operation by operation.

    Parameters
    ----------
    vm : VM
    host : Host
    enabled : bool
    """

    def __init__(self, vm: VM, host: Host, *, enabled: bool) -> None:
        self.vm = vm
        self.host = host
        self.enabled = enabled
        self._lines: list[str] = []
        if enabled:
            vm.events.enable(capacity=_CAPACITY)

    def note(self, line: str | None) -> None:
        """Add a line of the runner's behind what the model traced so far."""
        if self.enabled and line is not None:
            self._drain()
            self._lines.append(line)

    def take(self) -> list[str]:
        """All lines since the last call."""
        if self.enabled:
            self._drain()
        lines, self._lines = self._lines, []
        return lines

    def _drain(self) -> None:
        records = self.vm.events.drain()
        if len(records):
            self._lines += self.vm.events.text(records, roles=True, hva_name=self.host.name).splitlines()

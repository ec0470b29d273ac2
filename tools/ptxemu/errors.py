"""One exception class per kind of fault. Every one of them names the PTX line, the thread and, where there is one, the address."""


class PtxError(RuntimeError):
    """Attributes: line, text, source ("file:line" from .loc or ""), cta, thread, address (None where not applicable)."""

    def __init__(self, fault):
        self.line, self.text, self.source = (
            fault.get("line", 0),
            fault.get("text", ""),
            fault.get("source", ""),
        )
        self.cta, self.thread, self.address = fault.get("cta"), fault.get("thread"), fault.get("address")
        parts = [fault["message"]]
        if self.line:
            parts.append(f"  at PTX line {self.line}: {self.text}")
        if self.source:
            parts.append(f"  source {self.source}")
        if self.thread is not None:
            parts.append(f"  CTA {tuple(self.cta)} thread {tuple(self.thread)}")
        if self.address is not None:
            parts.append(f"  address {self.address:#x}" + (f" ({fault['where']})" if fault.get("where") else ""))
        super().__init__("\n".join(parts))


class Unsupported(PtxError):
    "An instruction, type or modifier that the interpreter does not implement. Never executed approximately."


class SyntaxFault(PtxError):
    "The PTX text cannot be parsed."


class LaunchError(PtxError):
    "The launch itself is invalid: sizes, parameters, resources."


class OutOfBounds(PtxError):
    "An access outside every registered block, the CTA's shared memory or the thread's local memory."


class Misaligned(PtxError):
    "An access that is not aligned to its size."


class SharedRace(PtxError):
    "Two warps access a shared word, one writing, without a barrier between them."


class GlobalRace(PtxError):
    "Two CTAs access a global word, one of them writing non-atomically, without synchronisation."


class Uninitialized(PtxError):
    "Shared or global memory is read before anything was written to it."


class UninitializedRegister(PtxError):
    "A register is read before it was written."


class MissingWait(PtxError):
    "Data of an asynchronous copy or an asynchronous matrix operation is used before the wait."


class Divergence(PtxError):
    "A barrier, shuffle or matrix instruction is not executed by all the threads it needs."


class Deadlock(PtxError):
    "No thread can make progress, or the instruction limit was reached."


class Trap(PtxError):
    "trap, or a failed device-side assertion."


class ReadOnly(PtxError):
    "A write to memory that was passed as read-only."


_CLASSES = {
    "Syntax": SyntaxFault,
    "Launch": LaunchError,
    **{
        c.__name__: c
        for c in (
            Unsupported,
            OutOfBounds,
            Misaligned,
            SharedRace,
            GlobalRace,
            Uninitialized,
            UninitializedRegister,
            MissingWait,
            Divergence,
            Deadlock,
            Trap,
            ReadOnly,
        )
    },
}


def from_fault(fault):
    return _CLASSES[fault["error"]](fault)

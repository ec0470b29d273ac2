"""What a launch did: instruction counts, traffic, conflicts, and a lower bound on its time on a GPU."""

import collections
import dataclasses

Site = collections.namedtuple(
    "Site", "line opcode kind executed lanes flops dtype accesses bytes units ideal source_line"
)

# Peak rates: per second for tensor/dram/l2, per clock and SM for the rest. NVIDIA A100/H100/H200 SXM data sheets and
# tuning guides; mma.sync on sm_90 reaches about 0.62 of the wgmma rate.
GPUS = {
    "a100": dict(
        sms=108,
        clock=1.41e9,
        tensor={"bf16": 312e12, "f16": 312e12, "tf32": 156e12, "s8": 624e12, "u8": 624e12, "f64": 19.5e12},
        mma_sync=1.0,
        fp32=64,
        int=64,
        mufu=16,
        issue=4,
        dram=2.039e12,
        l2=5120 * 1.41e9,
        atomics=1,
    ),
    "h100": dict(
        sms=132,
        clock=1.83e9,
        tensor={"bf16": 989e12, "f16": 989e12, "tf32": 494e12, "s8": 1979e12, "u8": 1979e12, "f64": 67e12},
        mma_sync=0.62,
        fp32=128,
        int=64,
        mufu=16,
        issue=4,
        dram=3.35e12,
        l2=5.5e12,
        atomics=1,
    ),
}
GPUS["h200"] = dict(GPUS["h100"], dram=4.8e12)


@dataclasses.dataclass
class Roofline:
    """Lower bounds in seconds, one per resource. An estimate from counts, not a timing: latency, occupancy, tails, ptxas
    scheduling and cache behaviour are not modelled; PTX instructions stand for SASS instructions."""

    gpu: str
    terms: dict

    @property
    def bound(self):
        return max(self.terms, key=self.terms.get)

    @property
    def seconds(self):
        return max(self.terms.values())

    def __str__(self):
        rows = "\n".join(f"  {k:22s} {v * 1e6:12.2f} us" for k, v in sorted(self.terms.items(), key=lambda kv: -kv[1]))
        return f"lower-bound ESTIMATE on {self.gpu} (not a timing): {self.seconds * 1e6:.2f} us, bound by {self.bound}\n{rows}"


class Stats:
    """Counts of one launch, or of several added together (+)."""

    def __init__(self, raw):
        self.kernel, self.arch, self.ctas, self.threads_per_cta = (
            raw["kernel"],
            raw["arch"],
            raw["ctas"],
            raw["threads_per_cta"],
        )
        self.shared_bytes, self.seconds, self.instructions = (
            raw["shared_bytes"],
            raw["seconds"],
            raw["instructions"],
        )
        self.ctas_per_cluster = raw["cluster"]
        self.host_threads, self.touched_bytes = raw["host_threads"], raw["touched_bytes"]
        self.sites = [Site(*s) for s in raw["sites"]]

    def __add__(self, other):
        out = object.__new__(Stats)
        out.__dict__.update(self.__dict__)
        out.kernel = self.kernel if self.kernel == other.kernel else self.kernel + " + " + other.kernel
        for k in ("ctas", "seconds", "instructions", "touched_bytes"):
            setattr(out, k, getattr(self, k) + getattr(other, k))
        out.sites = self.sites + other.sites
        return out

    def __radd__(self, other):
        return self if other == 0 else NotImplemented

    def _sum(self, kinds, field="executed"):
        return sum(getattr(s, field) for s in self.sites if s.kind in kinds)

    @property
    def by_opcode(self):
        """Warp-level dynamic count of every opcode with its modifiers."""
        c = collections.Counter()
        for s in self.sites:
            c[s.opcode] += s.executed
        return dict(c.most_common())

    @property
    def by_class(self):
        c = collections.Counter()
        for s in self.sites:
            c[s.kind] += s.executed
        return dict(c.most_common())

    @property
    def mma_flops(self):
        return sum(s.flops * s.executed for s in self.sites)

    @property
    def mma_flops_by_type(self):
        c = collections.Counter()
        for s in self.sites:
            if s.flops:
                c[("wgmma." if s.opcode.startswith("wgmma") else "mma.") + s.dtype] += s.flops * s.executed
        return dict(c)

    @property
    def mufu(self):
        """Special-function evaluations (per thread; packed f16x2 forms count once)."""
        return self._sum({"mufu"}, "lanes")

    @property
    def atomics(self):
        """Atomic operations issued by threads (vector forms count once)."""
        return self._sum({"atomic"}, "lanes")

    @property
    def global_bytes(self):
        """Bytes requested by threads from global memory, atomics on global memory included."""
        return sum(s.bytes for s in self.sites if self._is_global(s))

    @staticmethod
    def _is_global(s):
        return s.kind == "global" or (s.kind == "atomic" and ".shared" not in s.opcode)

    @staticmethod
    def _is_shared(s):
        return s.kind == "shared" or (s.kind == "atomic" and ".shared" in s.opcode)

    @property
    def global_sectors(self):
        """32-byte sectors requested: traffic to L1/L2 if nothing hits in L1."""
        return sum(s.units for s in self.sites if self._is_global(s))

    @property
    def coalescing(self):
        """Sectors needed for the bytes requested / sectors requested; 1.0 is perfect."""
        ideal, real = (sum(getattr(s, f) for s in self.sites if self._is_global(s)) for f in ("ideal", "units"))
        return ideal / real if real else 1.0

    @property
    def shared_wavefronts(self):
        return sum(s.units for s in self.sites if self._is_shared(s))

    @property
    def bank_conflicts(self):
        """Wavefronts beyond the conflict-free number."""
        return sum(s.units - s.ideal for s in self.sites if self._is_shared(s))

    def conflicts_by_site(self):
        """[(PTX line, opcode, wavefronts, ideal)] of the shared accesses with conflicts, worst first."""
        c = [(s.line, s.opcode, s.units, s.ideal) for s in self.sites if self._is_shared(s) and s.units > s.ideal]
        return sorted(c, key=lambda r: r[3] - r[2])

    def uncoalesced_by_site(self):
        """[(PTX line, opcode, sectors, ideal)] of the global accesses that request more sectors than needed, worst first."""
        c = [(s.line, s.opcode, s.units, s.ideal) for s in self.sites if self._is_global(s) and s.units > s.ideal]
        return sorted(c, key=lambda r: r[3] - r[2])

    @property
    def instructions_per_second(self):
        return self.instructions / self.seconds if self.seconds else 0.0

    def roofline(self, gpu="h100"):
        g = GPUS[gpu]
        per_clock = g["sms"] * g["clock"]
        tensor = 0.0
        for key, flops in self.mma_flops_by_type.items():
            unit, dtype = key.split(".")
            tensor += flops / (g["tensor"][dtype] * (g["mma_sync"] if unit == "mma" else 1.0))
        issued = sum(s.executed for s in self.sites if not s.opcode.startswith(("ld.param", "wgmma.mma")))
        return Roofline(
            gpu,
            {
                "tensor cores": tensor,
                "special functions": self._sum({"mufu"}) * 32 / g["mufu"] / per_clock,
                "fp32 pipe": self._sum({"fp32"}) * 32 / g["fp32"] / per_clock,
                "issue slots": issued / g["issue"] / per_clock,
                "shared memory": self.shared_wavefronts / per_clock,
                "L2 (no L1 hits)": self.global_sectors * 32 / g["l2"],
                "DRAM (touched once)": self.touched_bytes / g["dram"],
            },
        )

    def __str__(self):
        top = ", ".join(f"{k} {v}" for k, v in list(self.by_opcode.items())[:6])
        return (
            f"{self.kernel}: {self.ctas} CTAs x {self.threads_per_cta} threads, {self.instructions} warp instructions in {self.seconds:.3f} s "
            f"({self.instructions_per_second / 1e6:.1f} M/s)\n  mma {self.mma_flops / 1e9:.3f} GFLOP, MUFU {self.mufu}, atomics {self.atomics}\n"
            f"  global {self.global_bytes} B requested in {self.global_sectors} sectors (coalescing {self.coalescing:.2f}), {self.touched_bytes} B touched\n"
            f"  shared {self.shared_wavefronts} wavefronts, {self.bank_conflicts} from bank conflicts\n  {top}"
        )

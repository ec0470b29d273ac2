// isa.h - the decoded program: operands are byte offsets into a warp's register file, every instruction has a
// handler.
//
// Register file layout (per warp): a predicate is one u32 lane mask; a 16/32-bit register is u32[32]; a
// 64-bit register is u64[32]. Immediates, symbol addresses and special registers (%tid.x ...) are registers
// that are written once, when the warp starts, so that handlers never ask what kind of operand they have.
#pragma once
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>
#include "fault.h"
#include "types.h"

namespace ptx {

struct Warp;
struct Inst;
using Handler = void (*)(Warp&, const Inst&, u32 active);  // 'active' is never 0

enum class Space : u8 { Generic, Global, Shared, Local, Param, Const };

// How the scheduler treats an instruction.
enum class Flow : u8 {
    Plain,        // run the handler
    WarpSync,     // .sync with a membermask: every named live lane must have arrived (PTX ISA "shfl.sync",
                  // "bar.warp.sync" ...)
    Aligned,      // .aligned: all 32 lanes of the warp together (mma, ldmatrix, wgmma ...)
    AlignedLive,  // like Aligned, but exited lanes are allowed
    Branch,
    BranchIndexed,
    Exit,
    Barrier,
    ClusterWait,
    Poll,  // Poll: may fail and be retried (mbarrier.try_wait)
};

// What an instruction makes of a value that a load has left out, its guard being false (registers.cpp).
enum class Unread : u8 {
    Refuses,  // whatever reaches memory, an address, a branch or other lanes
    Passes,   // lane by lane, to what it writes
    Shuffles,
    Makes,  // a load
};

enum class Cls : u8 {  // cost class for Stats::roofline
    Other,
    Fp32,
    Fp16,
    Fp64,
    Int,
    Mufu,
    Tensor,
    Global,
    Shared,
    Local,
    Atomic,
    Control,
    Convert,
    Sync,
};

struct Inst {
    Handler run = nullptr;
    s32 guard = -1;     // register-file offset of the guard predicate
    u32 guard_xor = 0;  // ~0 for @!p
    Flow flow = Flow::Plain;
    Unread unread = Unread::Refuses;
    Cls cls = Cls::Other;
    Type type = Type::None, type2 = Type::None;
    Space space = Space::Generic;
    u8 vec = 1;            // vector length of ld/st, matrix count of ldmatrix
    u8 sub = 0, sub2 = 0;  // opcode-specific selector
    bool flag = false, flag2 = false, relaxed = false, cluster = false;  // cluster: shared::cluster addresses
    u32 d0 = 0, d1 = 0, s0 = 0, s1 = 0, s2 = 0, s3 = 0;  // operands
    u32 base = 0;                                        // address register
    s64 offset = 0;                                      // address displacement, or other immediate
    s32 target = -1;                                     // branch target
    s32 member = -1;                                     // membermask register of a WarpSync
    std::vector<u32> d, s;                               // vector operands
    std::vector<u32> reads, writes;  // definedness slots (offset / 4), predicates included
    std::vector<s32> targets;
    u32 index = 0;  // its place in the kernel
    int line = 0, file = 0, loc = 0;
    std::string opcode, text;
    std::string label;
    u64 flops = 0;  // per execution by a warp (mma)
};

struct Param {
    std::string name;
    Type type;
    u32 offset, size, align;
};
struct Symbol {
    Space space;
    u64 address;
    u64 size;
};  // Global/Const: host address; Shared/Local: offset

struct Constant {
    u32 offset;
    int width;
    u64 value;
};
enum class Special : u8 {
    TidX,
    TidY,
    TidZ,
    NtidX,
    NtidY,
    NtidZ,
    CtaidX,
    CtaidY,
    CtaidZ,
    NctaidX,
    NctaidY,
    NctaidZ,
    LaneId,
    WarpId,
    NWarpId,
    SmId,
    NSmId,
    LaneMaskEq,
    LaneMaskLt,
    LaneMaskLe,
    LaneMaskGt,
    LaneMaskGe,
    DynSmem,
    TotalSmem,
    DynBase,
    Zero,
    ClusterCtaidX,
    ClusterCtaidY,
    ClusterCtaidZ,
    ClusterNctaidX,
    ClusterNctaidY,
    ClusterNctaidZ,
    ClusterCtaRank,
    ClusterNctaRank,
    ClusterIdX,
    ClusterIdY,
    ClusterIdZ,
    NclusterIdX,
    NclusterIdY,
    NclusterIdZ,
    IsExplicitCluster,
    GridId,
};
struct SpecialReg {
    u32 offset;
    Special which;
    int width;
};

struct Register {
    Type type;
    u32 offset;
    int width;
};  // width 1: predicate, 4, 8, 16

struct Kernel {
    std::string name;
    std::vector<Param> params;
    u32 param_bytes = 0;
    std::vector<Inst> code;
    std::vector<Constant> constants;
    std::vector<SpecialReg> specials;
    u32 register_bytes = 0;
    u32 shared_static = 0, local_bytes = 0;
    u32 reqntid = 0, cluster[3] = {0, 0, 0};  // 0: not said
    bool named_barriers = false;  // anything beyond bar.sync 0 for the whole CTA: full vector clocks needed
    bool clusters = false;        // barrier.cluster orders its CTAs
    bool gpu_fences = false;      // inter-CTA synchronisation may exist
    bool order_sensitive =
        false;        // floating-point or value-returning global atomics: one host thread for reproducibility
    u32 granule = 4;  // of the inter-CTA race detector: the smallest global access, at most 4 bytes
};

struct Module {
    std::string target;
    int arch = 0;  // 80, 90 ...
    std::map<int, std::string> files;
    std::map<std::string, Symbol> symbols;       // module scope
    std::vector<std::unique_ptr<u8[]>> storage;  // module-scope variables
    std::vector<std::pair<u64, u64>> globals;    // address, size
    std::map<std::string, std::unique_ptr<Kernel>> kernels;
    std::map<std::string, std::string> broken;  // kernels that could not be decoded, and why
    std::vector<std::string> order;             // kernel names in file order
};

std::unique_ptr<Module> parse_module(const std::string& text);

}  // namespace ptx

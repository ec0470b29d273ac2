// registers.cpp - which lanes of a register hold something.
//
// A register that nothing has written may not be read. One load is let off: compilers load a few partial results under a
// guard, reduce them in all lanes and store under the guard again (Triton 3.6: `@p ld; shfl; min; @p st`). What such a
// load left out may be moved, computed with and shuffled, which makes nothing but more of its kind; whatever then reads
// it for good, memory, an address, a guard, a branch, a vote or a matrix instruction, is at fault.
#include "machine.h"

namespace ptx {

// An instruction reads what nothing has written, in some of the lanes m.
void Warp::read_unwritten(const Inst& i, u32 m) {
    for (u32 s : i.reads) {
        const u32 missing = m & ~defined[s];
        if (!missing) continue;
        if (const u32 never = missing & ~unread[s])
            fail(FaultKind::UninitializedRegister, "a register is read before it was written", __builtin_ctz(never));
        if (i.unread != Unread::Passes && !(i.unread == Unread::Shuffles && s == i.s0 / 4))
            fail(FaultKind::UninitializedRegister, "what a load left out, its guard being false, is used",
                 __builtin_ctz(missing));
    }
}

// It has written, and what it read of that kind is now what it wrote.
void Warp::pass_on(const Inst& i, u32 m) {
    for (u32 d : i.writes) {
        defined[d] = (defined[d] | m) & ~passed;
        unread[d] |= passed;
    }
}

void Warp::check_guard(const Inst& i, u32 mask) {
    const u32 slot = (u32)i.guard / 4, missing = mask & ~defined[slot];
    if (!missing) return;
    active = mask;
    const bool never = missing & ~unread[slot];
    fail(FaultKind::UninitializedRegister,
         never ? "the guard predicate was never written"
               : "the guard predicate comes of what a load left out, its own guard being false",
         __builtin_ctz(never ? missing & ~unread[slot] : missing));
}

// Lanes m of a load do not load.
void Warp::left_out(const Inst& i, u32 m) {
    for (u32 d : i.writes) unread[d] |= m & ~defined[d];
}

}  // namespace ptx

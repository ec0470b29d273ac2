// mbarrier.h - what bulk copies need of mbarrier objects.
#pragma once
#include "machine.h"

namespace ptx {

Mbarrier& mbarrier_at(Warp& w, Cta& c, int lane, u64 address);  // in c; a fault where none was initialised
// A copy by w to these ranges of c's shared memory, together n bytes, has been issued and reports to b.
void expect_copy(Warp& w, Cta& c, Mbarrier& b, const std::vector<std::pair<u32, u32>>& ranges, u32 n);

}  // namespace ptx

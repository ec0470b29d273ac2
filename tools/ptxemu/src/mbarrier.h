// mbarrier.h - what bulk copies need of mbarrier objects.
#pragma once
#include "machine.h"

namespace ptx {

Mbarrier& mbarrier_at(Warp& w, int lane, u32 address);  // a fault where none was initialised
// A copy by this lane of these ranges of shared memory, together n bytes, has been issued and reports to b.
void expect_copy(Warp& w, Mbarrier& b, const std::vector<std::pair<u32, u32>>& ranges, u32 n);

}  // namespace ptx

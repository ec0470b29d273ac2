#include "own_pairs.h"

#include <map>
#include <mutex>
#include <string>

#include "../isa.h"
#include "task.h"

namespace fastcl::cpu {
namespace {

std::mutex mutex;

// Never destroyed: a thread may still compute when the process ends.
auto& added() {
  static auto* all = new std::map<std::string, const OwnPair*, std::less<>>();
  return *all;
}

}  // namespace

const OwnPair* own_pair(std::string_view name) {
  const std::lock_guard lock(mutex);
  const auto found = added().find(name);
  return found == added().end() ? nullptr : found->second;
}

// Adds what an opened library holds, for good. False where it is of another instruction set than the one in use.
extern "C" __attribute__((visibility("default"))) bool fastcl_add_own_pair(const char* name, const OwnPair* pair) {
  if (chosen_isa() != pair->isa || pair->constants > most_constants) return false;
  const std::lock_guard lock(mutex);
  added().emplace(name, pair);
  return true;
}

}  // namespace fastcl::cpu

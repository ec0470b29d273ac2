#include "form.h"

#include <cstdlib>
#include <string_view>

#include "fused_schedule.h"
#include "sm_90a/schedule.h"

namespace fastcl::cuda {
namespace {

constexpr char variable[] = "FASTCL_CUDA";

// The widest d at which the fused form is faster: predicted until measured. Each entry compares the lower bounds that counted
// instructions and bytes give at n = m = 65,536 (a fused pass overlaps its terms, the strip form's passes add up), so that near
// a border either form may win.
struct Entry {
  int major, minor;        // from this compute capability on, until the next entry
  int64_t rows, gradients; // of two-byte rows
  int64_t rows_tf32, gradients_tf32;
  bool hopper;             // rows of two bytes by the kernels of sm_90a, of any d
};
constexpr Entry table[] = {
    // A100: 5 products at the tensor cores' bound beat 4 and the epilogues up to 256; at 512 dX no longer fits.
    {8, 0, 1024, 256, 512, 128, false},
    // 99 KB of shared memory: the gradient holds 128.
    {8, 6, 1024, 128, 512, 128, false},
    // H100: wgmma in the sweeps too, 4 products where fused takes 5, 2 bytes a pair where strip moves 22. Counted, never measured.
    {9, 0, 512, 128, 256, 0, true},
    // B200: mma.sync reaches 62% of the peak of wgmma, which the strip form's matrix products have: a tie at 256.
    {10, 0, 512, 128, 256, 0, false},
    {12, 0, 1024, 128, 512, 128, false},
};

const Entry* entry_of(const DeviceFacts& facts) {
  const Entry* entry = nullptr;
  for (const Entry& e : table)
    if (std::pair(facts.major, facts.minor) >= std::pair(e.major, e.minor)) entry = &e;
  return entry;
}

bool predicted(const Problem& p, const DeviceFacts& facts, bool gradients) {
  const Entry* entry = entry_of(facts);
  if (entry == nullptr) return false;
  const bool tf32 = p.x.scalar_type() == at::kFloat;
  const int64_t rows = tf32 ? entry->rows_tf32 : entry->rows, both = tf32 ? entry->gradients_tf32 : entry->gradients;
  return p.d <= (gradients ? both : rows);
}

}  // namespace

DeviceFacts device_facts(const Tensor& t) {
  const c10::OptionalDeviceGuard guard(t.device());
  DeviceFacts facts{};
  check(fastcl_cuda_device_facts(&facts), "device_facts");
  return facts;
}

Form form(const Problem& p, bool gradients) {
  const char* text = std::getenv(variable);
  const std::string_view name = text == nullptr || *text == '\0' ? "auto" : text;
  TORCH_CHECK_VALUE(name == "strip" || name == "fused" || name == "hopper" || name == "auto", variable, ": expected strip, fused, hopper or auto, got '", name, "'");
  if (name == "strip" || p.n == 0 || p.m == 0) return Form::strip;
  const DeviceFacts facts = device_facts(p.x);
  const Entry* entry = entry_of(facts);
  const bool preferred = name == "hopper" || (name == "auto" && entry != nullptr && entry->hopper);
  if (preferred && hopper::holds(p, facts)) return Form::hopper;
  if (!(gradients ? fused::holds_gradients(p, facts) : fused::holds_rows(p, facts))) return Form::strip;
  return name == "fused" || predicted(p, facts, gradients) ? Form::fused : Form::strip;
}

}  // namespace fastcl::cuda

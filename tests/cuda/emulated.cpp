// Stands in for the CUDA kernels and for the allocator of device memory, so that the ops of csrc/cuda/launches.cpp take CPU
// tensors: every launch goes to a hook, with its struct.
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "aligned.h"
#include "sm_90a/launch.h"

namespace {

using Hook = int (*)(const char* name, void* arguments, int64_t bytes);
Hook hook = nullptr;

template <class Struct>
int call(const char* name, const Struct* arguments) {
  Struct copy = *arguments;
  return hook ? hook(name, &copy, sizeof copy) : 100;  // cudaErrorNoDevice
}

// Fills memory: NaN in float64, float32, bfloat16 and float16, and bits that no result has (all ones are half of 1 - 2^-53).
constexpr uint32_t unwritten = 0xFFD3FFB5;

// torch's own allocator, remembering what is alive, and filling it with `unwritten`.
class Recorder final : public c10::Allocator {
 public:
  struct Block {
    size_t bytes;
    c10::DeleterFnPtr deleter;
  };
  std::map<void*, Block> alive;
  std::mutex mutex;
  c10::Allocator* torch = nullptr;

  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr data = torch->allocate(bytes);
    void* const address = data.get();
    if (address == nullptr) return data;
    for (size_t k = 0; k < bytes; k += sizeof unwritten)
      std::memcpy(static_cast<char*>(address) + k, &unwritten, std::min(sizeof unwritten, bytes - k));
    const std::lock_guard lock(mutex);
    alive[address] = {bytes, data.get_deleter()};
    data.release_context();
    return {address, address, &forget, data.device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &forget; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  static void forget(void* address);
};

Recorder& recorder() {
  static auto* r = new Recorder;  // outlives every tensor
  return *r;
}

void Recorder::forget(void* address) {
  if (address == nullptr) return;
  Recorder& r = recorder();
  Block block;
  {
    const std::lock_guard lock(r.mutex);
    const auto found = r.alive.find(address);
    block = found->second;
    r.alive.erase(found);
  }
  block.deleter(address);
}

}  // namespace

extern "C" {

#define FASTCL_STAND_IN(name, Struct) \
  int fastcl_cuda_##name(const fastcl::cuda::Struct* arguments, void*) { return call(#name, arguments); }
FASTCL_FOR_EACH_STRIP_LAUNCH(FASTCL_STAND_IN)
FASTCL_FOR_EACH_FUSED_LAUNCH(FASTCL_STAND_IN)
FASTCL_FOR_EACH_HOPPER_LAUNCH(FASTCL_STAND_IN)
FASTCL_FOR_EACH_ALIGNED_LAUNCH(FASTCL_STAND_IN)

int fastcl_cuda_use_device(int) { return 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
const char* fastcl_cuda_error_string(int error) { return error == 100 ? "no CUDA-capable device is detected" : "a fault in the emulator"; }

void emulated_begin(Hook with) {
  hook = with;
  Recorder& r = recorder();
  r.torch = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&r, 255);
}
void emulated_end() {
  hook = nullptr;
  c10::SetCPUAllocator(recorder().torch, 255);
}
// The block that holds the address, or 0 bytes.
int64_t emulated_block(uint64_t address, uint64_t* begin) {
  Recorder& r = recorder();
  const std::lock_guard lock(r.mutex);
  auto next = r.alive.upper_bound(reinterpret_cast<void*>(address));
  if (next == r.alive.begin()) return 0;
  const auto& [start, block] = *--next;
  *begin = reinterpret_cast<uint64_t>(start);
  return address < *begin + block.bytes ? int64_t(block.bytes) : 0;
}
}

#include "host.h"

#include <cstring>
#include <new>

#include "../tensors.h"

namespace fastcl::cpu {

Host TorchHost::host() {
  return Host{this, thread_count(),
              [](void* self, int tasks, void (*body)(void*, int), void* argument) {
                parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
                  for (int64_t t = begin; t < end; t++) body(argument, int(t));
                });
                static_cast<TorchHost*>(self)->interruption_.check();
              },
              [](void* self, size_t bytes) { return static_cast<TorchHost*>(self)->allocate(bytes); }, interruption_.flag()};
}

TorchHost::Kept& TorchHost::kept() {
  thread_local Kept kept;
  return kept;
}

TorchHost::TorchHost() {
  Kept& k = kept();
  if (k.lent) return;
  if (!k.memory) k.memory.reset(std::aligned_alloc(64, kept_bytes));
  rest_ = static_cast<char*>(k.memory.get());
  rest_bytes_ = rest_ == nullptr ? 0 : kept_bytes;
  borrows_ = k.lent = true;
}

TorchHost::~TorchHost() {
  if (borrows_) kept().lent = false;
}

void* TorchHost::allocate(size_t bytes) {
  constexpr size_t line = 64;
  bytes = (std::max(bytes, line) + line - 1) / line * line;
  void* memory = rest_;
  if (bytes <= rest_bytes_) {
    rest_ += bytes, rest_bytes_ -= bytes;
  } else {
    memory = memory_.emplace_back(std::aligned_alloc(line, bytes)).get();
    if (memory == nullptr) throw std::bad_alloc();
  }
  return poisoned() ? std::memset(memory, 0xff, bytes) : memory;
}

}  // namespace fastcl::cpu

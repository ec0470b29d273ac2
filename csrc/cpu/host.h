// Threads and memory for a call of a kernel.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "interruption.h"
#include "task.h"

namespace fastcl::cpu {

// torch's intra-op threads, and memory, as the kernels see them. Memory lives as long as this object.
class TorchHost {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  // What a small call needs comes from memory that the calling thread keeps: given back, the system would take its pages away, and
  // for 128 rows to touch them anew took a tenth of a call.
  static constexpr size_t kept_bytes = size_t(1) << 21;
  struct Kept {
    std::unique_ptr<void, Free> memory;
    bool lent = false;
  };
  static Kept& kept();

  std::vector<std::unique_ptr<void, Free>> memory_;
  char* rest_ = nullptr;  // of what was lent
  size_t rest_bytes_ = 0;
  bool borrows_ = false;
  Interruption interruption_;

 public:
  TorchHost();
  ~TorchHost();
  TorchHost(const TorchHost&) = delete;
  Host host();
  void* allocate(size_t bytes);
  // What is allocated while one lives is given back at its end: the second sweep of a call holds no panels of the first.
  class Scope {
    TorchHost& host_;
    const size_t count_ = host_.memory_.size(), rest_bytes_ = host_.rest_bytes_;
    char* const rest_ = host_.rest_;

   public:
    explicit Scope(TorchHost& host) : host_(host) {}
    Scope(const Scope&) = delete;
    ~Scope() {
      host_.memory_.resize(count_);
      host_.rest_ = rest_, host_.rest_bytes_ = rest_bytes_;
    }
  };
  // Elements [0, count) for use and `slack` more that may be read, all zero.
  template <class U>
  U* vector(int64_t count) {
    auto* v = static_cast<U*>(allocate((count + slack) * sizeof(U)));
    std::fill(v, v + count + slack, U(0));
    return v;
  }
};

}  // namespace fastcl::cpu

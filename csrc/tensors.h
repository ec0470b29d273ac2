// Tensors, numbers of 16 bits and torch's threads, over the C functions of torch_abi.h.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "torch_abi.h"

namespace fastcl {

// Raises RuntimeError where torch's function has failed; torch itself has then written why to stderr.
void require(AOTITorchError error, const char* function);
#define FASTCL_TORCH(function, ...) ::fastcl::require(function(__VA_ARGS__), #function)

struct DeleteTensor {
  void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
};

// A tensor of torch, owned; its layout is read once. Moved, never copied.
class Tensor {
  std::unique_ptr<AtenTensorOpaque, DeleteTensor> handle_;
  int64_t dim_, *sizes_, *strides_;
  ScalarKind kind_;

 public:
  explicit Tensor(AtenTensorHandle owned);
  AtenTensorHandle release() { return handle_.release(); }
  Tensor again() const;  // the same tensor, owned once more
  Described describe() const;

  ScalarKind kind() const { return kind_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t k) const { return sizes_[k]; }
  int64_t stride(int64_t k) const { return strides_[k]; }
  int64_t count() const;
  bool same_shape(const Tensor& other) const;
  const void* data() const;
  void* mutable_data() const;
  template <class T>
  const T* data_as() const { return static_cast<const T*>(data()); }
  template <class T>
  T* mutable_data_as() const { return static_cast<T*>(mutable_data()); }
};
using OptionalTensor = std::optional<Tensor>;

// A new contiguous tensor on the CPU, of at most two dimensions.
Tensor empty(std::initializer_list<int64_t> shape, ScalarKind kind);
// The same on any device.
Tensor empty(std::initializer_list<int64_t> shape, ScalarKind kind, int32_t device_type, int32_t device_index);
Tensor zeros(std::initializer_list<int64_t> shape, ScalarKind kind);

// The two dtypes of 16 bits, with the conversions of torch: to the nearest, ties to even.
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float f) {
    const uint32_t b = std::bit_cast<uint32_t>(f);
    bits = f != f ? 0x7fc0 : uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};
struct Float16 {
  uint16_t bits;
  Float16() = default;
  // The exponent's bias moves by multiplications, which round and overflow as the format itself does.
  explicit Float16(float f) {
    const uint32_t b = std::bit_cast<uint32_t>(f), doubled = b + b;
    const float scaled = (std::bit_cast<float>(b & 0x7fffffffu) * 0x1p112f) * 0x1p-110f;
    const uint32_t bias = (doubled & 0xff000000u) < 0x71000000u ? 0x71000000u : doubled & 0xff000000u;
    const uint32_t r = std::bit_cast<uint32_t>(std::bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
    const uint32_t magnitude = ((r >> 13) & 0x7c00u) + (r & 0x0fffu);
    bits = uint16_t(((b & 0x80000000u) >> 16) | (doubled > 0xff000000u ? 0x7e00u : magnitude));
  }
  operator float() const {
    const uint32_t w = uint32_t(bits) << 16, doubled = w + w;
    const float normal = std::bit_cast<float>((doubled >> 4) + (0xe0u << 23)) * 0x1p-112f;
    const float subnormal = std::bit_cast<float>((doubled >> 17) | (126u << 23)) - 0.5f;
    return std::bit_cast<float>((w & 0x80000000u) | std::bit_cast<uint32_t>(doubled < (1u << 27) ? subnormal : normal));
  }
};

template <class T>
inline constexpr ScalarKind kind_of = ScalarKind::float32;
template <>
inline constexpr ScalarKind kind_of<double> = ScalarKind::float64;

// Calls body(T()) with the C++ type of a floating dtype.
template <class Body>
decltype(auto) with_type(ScalarKind kind, Body body) {
  switch (kind) {
    case ScalarKind::float64: return body(double());
    case ScalarKind::bfloat16: return body(BFloat16());
    case ScalarKind::float16: return body(Float16());
    default: return body(float());
  }
}

int thread_count();

// body(begin, end) of ranges of [0, count) on torch's own threads; with at least `grain` in each.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  FASTCL_TORCH(torch_parallel_for, 0, count, grain,
               [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
               const_cast<Body*>(&body));
}

// The same for the rows of a matrix with d columns: a thread is worth waking for some 32,768 elements.
template <class Body>
void for_each_row(int64_t count, int64_t d, const Body& body) {
  parallel_for(count, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, d)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(i);
  });
}

// An op's arguments, in order, as torch hands them to a kernel of the stable interface: each is taken once, and is then ours.
class Stack {
  StableIValue* at_;
  template <class T>
  T plain() {
    T value;
    std::memcpy(&value, at_++, sizeof value);  // little endian, as all processors that we build for
    return value;
  }
  template <class T>
  std::vector<T> list();

 public:
  explicit Stack(StableIValue* at) : at_(at) {}
  Tensor tensor() { return Tensor(plain<AtenTensorHandle>()); }
  OptionalTensor optional_tensor();
  int64_t integer() { return plain<int64_t>(); }
  double number() { return plain<double>(); }
  bool boolean() { return plain<bool>(); }
  std::string text();
  std::vector<double> numbers();
  std::array<bool, 6> six_booleans();

  // Results take the place of the arguments.
  void put(Tensor t) { put(t.release()); }
  void put_text(const std::string& text);
  template <class T>
  void put(T value) {
    *at_ = 0;
    std::memcpy(at_++, &value, sizeof value);
  }
};

// Whether fresh memory is filled with NaN, so that tests see what is used before it is written: FASTCL_POISON was set.
bool poisoned();

using Kernel = void (*)(StableIValue* stack, uint64_t, uint64_t);

// Registers kernels while the library is opened, for as long as the process lives: under a dispatch key, for schemas that are there
// or will be, or with their schemas.
class Registration {
 public:
  struct Entry {
    const char* name;
    Kernel kernel;
    const char* schema = nullptr;
  };
  Registration(const char* library, const char* key, std::initializer_list<Entry> entries);
};

}  // namespace fastcl

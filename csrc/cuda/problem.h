// From the op's arguments to what the kernels read, and from the four sums to gradients: what strip and fused share.
// ATen only, no CUDA header: tensor values are never read on the host, and nothing here waits for the device.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string_view>

#include "../arguments.h"
#include "launch.h"

// The parameters of an op's implementation, and what they are gathered in.
#define FASTCL_PROBLEM                                                                                                    \
  const at::Tensor &x, const std::optional<at::Tensor>&y, const at::Tensor &scale, const at::Tensor &shift,               \
      const std::optional<at::Tensor>&bias_x, const std::optional<at::Tensor>&bias_y,                                     \
      const std::optional<at::Tensor>&group_x, const std::optional<at::Tensor>&group_y,                                   \
      const std::optional<at::Tensor>&limit_x, const std::optional<at::Tensor>&limit_y, int64_t row_offset,               \
      int64_t col_offset, int64_t period, c10::string_view mask, c10::string_view operand, c10::string_view pair,                         \
      at::ArrayRef<double> constants, c10::string_view reduce, bool columns
#define FASTCL_GIVEN                                                                                                       \
  ::fastcl::cuda::Given {                                                                                                  \
    x, y, scale, shift, bias_x, bias_y, group_x, group_y, limit_x, limit_y, row_offset, col_offset, period, mask, operand, pair, constants, \
        reduce, columns                                                                                                     \
  }

namespace fastcl::cuda {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The op's arguments: its tensors, and what is checked of them.
struct Given {
  const Tensor& x;
  const OptionalTensor& y;
  const Tensor &scale, &shift;
  const OptionalTensor &bias_x, &bias_y, &group_x, &group_y, &limit_x, &limit_y;
  int64_t row_offset, col_offset, period;
  std::string_view mask, operand, pair;
  at::ArrayRef<double> constants;
  std::string_view reduce;
  bool columns;

  Choices check() const;
};

// Undefined where not wanted.
struct Gradients {
  Tensor x, y, scale, shift, bias_x, bias_y;
};

struct Total {
  Tensor value;
  Gradients gradients;
  Tensor dpositive;
};

// The problem, checked; its vectors are contiguous. dtype is that of r, c and everything scalar.
struct Problem {
  explicit Problem(const Given& a);

  Tensor x, y, scale, shift, bias_x, bias_y, group_x, group_y;  // y is x where the two are one; absent vectors are undefined
  bool symmetric, columns;
  Operand operand;
  MaskKind mask;
  Reduction reduce;
  int pair;
  std::array<double, 2> constants{};
  int64_t n, m, d, diff;  // diff = row_offset - col_offset, clamped to what can meet
  at::ScalarType dtype;

  bool lse() const { return reduce == Reduction::logsumexp; }
  Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, options()); }
  Tensor zeros(at::IntArrayRef shape) const { return at::zeros(shape, options()); }
  at::TensorOptions options() const { return x.options().dtype(dtype); }
};

// x and y as the kernels multiply them; for sqdist about a common centre, with their squared norms. 16-bit operands stay in 16
// bits: their products are exact in float32.
struct Sides {
  explicit Sides(const Problem& p);

  Tensor x, y, norm_x, norm_y;
  // What z is; swapped: with the roles of x and y exchanged. Valid while the problem and the sides live.
  Equation equation(const Problem& p, bool swapped = false) const;
};

// W Y (n, d), W^T X (m, d), W 1 (n,), W^T 1 (m,): those that the wanted gradients need, in T. With x itself each is
// gathered in both roles of a pair, and wtx and w_cols are undefined.
struct Sums {
  Sums(const Problem& p, const Sides& s, const Wanted& wanted);

  Tensor wy, wtx, w_rows, w_cols;

  void multiply(const Tensor& factor);
  // dx and dy in `dtype`, by the formulas of the catalogue; the gathered weights are in `unit` where that is defined.
  Gradients gradients(at::ScalarType dtype, const Tensor& unit = {});

 private:
  Tensor scale_gradient() const;
  Tensor finish(const Tensor& sums, const Tensor& weights, const Tensor& rows, at::ScalarType dtype) const;

  const Problem& p_;
  const Sides& s_;
  Wanted wanted_;
};

// What the float16 weights of a log-sum-exp are divided by, so that they neither overflow nor vanish: one element; undefined
// for others.
Tensor weight_unit(const Problem& p, const Tensor& g, const Tensor& h);

// (rho, close) of Weighting, formed without reading a value on the host.
Tensor softmax_reference(const Tensor& r, const Tensor& c);

// Value of outer(r), its gradient g to r and that to the positives, in float64 as r.
struct OuterForm {
  Tensor value, g, dpositive;
};
OuterForm outer_form(Outer outer, const Tensor& r, const Tensor& positive);
// log(e^a + e^b); -inf where both are.
Tensor merged(const Tensor& a, const Tensor& b);

Dtype dtype_of(const Tensor& t);
inline const void* pointer(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline void* mutable_pointer(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// The stream that torch has made current for the tensor's device; in register.cpp, which no emulator links.
void* current_stream(const Tensor& t);
// Raises RuntimeError with the runtime's own words for what a launch returned.
void check(int error, std::string_view launch);

#define FASTCL_LAUNCH(name, arguments, like) \
  ::fastcl::cuda::check(fastcl_cuda_##name(&(arguments), ::fastcl::cuda::current_stream(like)), #name)

}  // namespace fastcl::cuda

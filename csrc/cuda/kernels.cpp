#include "kernels.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>

#include "form.h"
#include "fused_schedule.h"
#include "sm_90a/schedule.h"
#include "strip.h"

namespace fastcl::cuda {
namespace {

// Neither autograd nor autocast inside (a product of float32 sums stays float32), and launches on the device of x.
class Plain {
  at::AutoDispatchBelowADInplaceOrView no_autograd_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
  c10::OptionalDeviceGuard device_;

 public:
  explicit Plain(const Tensor& x) : device_(x.device()) {}
};

// Outputs as the fake form promises them: an empty tensor for what is absent.
Tensor present(const Tensor& t, const Problem& p) { return t.defined() ? t.contiguous() : p.empty({0}); }

std::array<Tensor, 6> present(const Gradients& g, const Problem& p) {
  return {present(g.x, p), present(g.y, p), present(g.scale, p), present(g.shift, p), present(g.bias_x, p), present(g.bias_y, p)};
}

template <class Function>
Function* chosen(Form form, Function* strip, Function* fused, Function* hopper) {
  return form == Form::hopper ? hopper : form == Form::fused ? fused : strip;
}

Tensor vector(const char* name, const Tensor& v, int64_t length, const Problem& p) {
  TORCH_CHECK_VALUE(v.dim() == 1 && v.size(0) == length, name, ": expected shape (", length, ",), got ", v.sizes());
  TORCH_CHECK_VALUE(v.device() == p.x.device(), name, ": expected a tensor on the device of x, ", p.x.device(), ", got one on ", v.device());
  return v.to(p.dtype);
}

std::tuple<Tensor, Tensor> rows(FASTCL_PROBLEM) {
  const Plain plain(x);
  const Problem p(FASTCL_GIVEN);
  const auto [r, c] = chosen(form(p, false), strip::rows, fused::rows, hopper::rows)(p);
  return {present(r, p), present(c, p)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gradients(FASTCL_PROBLEM, const Tensor& r, const Tensor& c, const Tensor& g,
                                                                     const Tensor& h, std::array<bool, 6> wanted) {
  const Plain plain(x);
  const Problem p(FASTCL_GIVEN);
  const auto of_y = [&](const char* name, const Tensor& v) { return p.columns ? vector(name, v, p.m, p) : Tensor(); };
  const auto serve = chosen(form(p, true), strip::gradients, fused::gradients, hopper::gradients);
  return std::tuple_cat(present(serve(p, vector("r", r, p.n, p), of_y("c", c), vector("g", g, p.n, p), of_y("h", h), Wanted(wanted)), p));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> total(FASTCL_PROBLEM, const OptionalTensor& positive,
                                                                                 c10::string_view outer_name, std::array<bool, 6> wanted) {
  const Plain plain(x);
  const Problem p(FASTCL_GIVEN);
  const Outer outer = outer_of(outer_name, p.reduce, positive.has_value());
  const auto serve = chosen(form(p, Wanted(wanted).any()), strip::total, fused::total, hopper::total);
  const Total t = serve(p, positive ? vector("positive", *positive, p.n, p) : Tensor(), outer, Wanted(wanted));
  return std::tuple_cat(std::tuple(t.value), present(t.gradients, p), std::tuple(present(t.dpositive, p)));
}

}  // namespace

void implement(torch::Library& library) {
  library.impl("kernel_rows", rows);
  library.impl("kernel_gradients", gradients);
  library.impl("kernel_total", total);
}

}  // namespace fastcl::cuda

#include "tensors.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace fastcl {

// pybind11, which calls the ops from Python, makes ValueError of std::invalid_argument; TypeError it makes of nothing in std, so
// that fastcl/backends/native.py asks for the dtypes first.
void refuse_value(const std::string& message) { throw std::invalid_argument(message); }
void refuse_type(const std::string& message) { throw std::invalid_argument(message); }

namespace {

struct NamedDtype {
  int32_t (*code)();
  ScalarKind kind;
  const char* name;
};
constexpr NamedDtype dtypes[] = {{aoti_torch_dtype_float32, ScalarKind::float32, "float32"},
                                 {aoti_torch_dtype_float64, ScalarKind::float64, "float64"},
                                 {aoti_torch_dtype_bfloat16, ScalarKind::bfloat16, "bfloat16"},
                                 {aoti_torch_dtype_float16, ScalarKind::float16, "float16"},
                                 {aoti_torch_dtype_int64, ScalarKind::int64, "int64"},
                                 {aoti_torch_dtype_int32, ScalarKind::int32, "int32"}};

ScalarKind kind_of_tensor(AtenTensorHandle handle) {
  int32_t code = 0;
  FASTCL_TORCH(aoti_torch_get_dtype, handle, &code);
  for (const NamedDtype& d : dtypes)
    if (d.code() == code) return d.kind;
  return ScalarKind::other;
}

int64_t bytes_of(ScalarKind kind) { return kind == ScalarKind::float32 || kind == ScalarKind::int32 ? 4 : kind == ScalarKind::float64 || kind == ScalarKind::int64 ? 8 : 2; }

}  // namespace

void require(AOTITorchError error, const char* function) {
  if (error != 0) throw std::runtime_error(text_of("fastcl: torch's ", function, " failed; what it wrote above says why"));
}

Tensor::Tensor(AtenTensorHandle owned) : handle_(owned) {
  FASTCL_TORCH(aoti_torch_get_dim, owned, &dim_);
  FASTCL_TORCH(aoti_torch_get_sizes, owned, &sizes_);
  FASTCL_TORCH(aoti_torch_get_strides, owned, &strides_);
  kind_ = kind_of_tensor(owned);
}

Tensor Tensor::again() const {
  AtenTensorHandle handle = nullptr;
  FASTCL_TORCH(aoti_torch_new_tensor_handle, handle_.get(), &handle);
  return Tensor(handle);
}

Described Tensor::describe() const {
  Described d{dim_, sizes_, kind_, "another dtype"};
  for (const NamedDtype& named : dtypes)
    if (named.kind == kind_) d.dtype = named.name;
  FASTCL_TORCH(aoti_torch_get_device_type, handle_.get(), &d.device_type);
  FASTCL_TORCH(aoti_torch_get_device_index, handle_.get(), &d.device_index);
  d.device = d.device_type == aoti_torch_device_type_cpu() ? "cpu" : d.device_type == aoti_torch_device_type_cuda() ? "cuda" : "another";
  if (d.device_type == aoti_torch_device_type_cpu()) d.device_index = 0;
  return d;
}

int64_t Tensor::count() const {
  int64_t count = 1;
  for (int64_t k = 0; k < dim_; k++) count *= sizes_[k];
  return count;
}

bool Tensor::same_shape(const Tensor& other) const {
  return dim_ == other.dim_ && std::equal(sizes_, sizes_ + dim_, other.sizes_);
}

const void* Tensor::data() const {
  const void* data = nullptr;
  FASTCL_TORCH(torch_get_const_data_ptr, handle_.get(), &data);
  return data;
}

void* Tensor::mutable_data() const {
  void* data = nullptr;
  FASTCL_TORCH(torch_get_mutable_data_ptr, handle_.get(), &data);
  return data;
}

Tensor empty(std::initializer_list<int64_t> shape, ScalarKind kind) {
  Tensor made = empty(shape, kind, aoti_torch_device_type_cpu(), 0);
  // An empty tensor has no memory, and memset takes no null.
  if (made.count() != 0 && poisoned()) std::memset(made.mutable_data(), 0xff, size_t(made.count() * bytes_of(kind)));
  return made;
}

Tensor empty(std::initializer_list<int64_t> shape, ScalarKind kind, int32_t device_type, int32_t device_index) {
  std::array<int64_t, 2> strides{};
  int64_t count = 1;
  for (size_t k = shape.size(); k-- > 0;) strides[k] = count, count *= std::max<int64_t>(shape.begin()[k], 1);
  const NamedDtype* named = dtypes;
  while (named->kind != kind) named++;
  AtenTensorHandle handle = nullptr;
  FASTCL_TORCH(aoti_torch_empty_strided, int64_t(shape.size()), shape.begin(), strides.data(), named->code(), device_type, device_index, &handle);
  return Tensor(handle);
}

Tensor zeros(std::initializer_list<int64_t> shape, ScalarKind kind) {
  Tensor made = empty(shape, kind);
  char* data = made.mutable_data_as<char>();
  // The threads that will add to it touch it first.
  parallel_for(made.count() * bytes_of(kind), 1 << 18, [&](int64_t begin, int64_t end) { std::memset(data + begin, 0, size_t(end - begin)); });
  return made;
}

bool poisoned() {
  static const bool set = std::getenv("FASTCL_POISON") != nullptr;
  return set;
}

int thread_count() {
  uint32_t count = 1;
  FASTCL_TORCH(torch_get_num_threads, &count);
  return int(count);
}

OptionalTensor Stack::optional_tensor() {
  auto* boxed = plain<StableIValue*>();
  if (boxed == nullptr) return {};
  Stack inner(boxed);
  OptionalTensor t(inner.tensor());
  delete boxed;  // as torch's own headers do
  return t;
}

std::string Stack::text() {
  const auto handle = plain<StringHandle>();
  size_t length = 0;
  const char* data = nullptr;
  FASTCL_TORCH(torch_string_length, handle, &length);
  FASTCL_TORCH(torch_string_c_str, handle, &data);
  std::string text(data, length);
  FASTCL_TORCH(torch_delete_string, handle);
  return text;
}

void Stack::put_text(const std::string& text) {
  StringHandle handle = nullptr;
  FASTCL_TORCH(torch_new_string_handle, text.data(), text.size(), &handle);
  put(handle);
}

template <class T>
std::vector<T> Stack::list() {
  const auto handle = plain<StableListHandle>();
  size_t size = 0;
  FASTCL_TORCH(torch_list_size, handle, &size);
  std::vector<T> values;
  values.reserve(size);
  for (size_t k = 0; k < size; k++) {
    StableIValue element = 0;
    FASTCL_TORCH(torch_list_get_item, handle, k, &element);
    values.push_back(Stack(&element).plain<T>());
  }
  FASTCL_TORCH(torch_delete_list, handle);
  return values;
}

std::vector<double> Stack::numbers() { return list<double>(); }

std::array<bool, 6> Stack::six_booleans() {
  const std::vector<bool> values = list<bool>();
  FASTCL_CHECK_VALUE(values.size() == 6, "wanted: expected 6 values, got ", int64_t(values.size()));
  std::array<bool, 6> six;
  std::copy(values.begin(), values.end(), six.begin());
  return six;
}

Registration::Registration(const char* name, const char* key, std::initializer_list<Entry> entries) {
  TorchLibraryHandle library = nullptr, schemas = nullptr;
  FASTCL_TORCH(aoti_torch_library_init_impl, name, key, __FILE__, __LINE__, &library);
  for (const Entry& e : entries) {
    if (e.schema != nullptr) {
      if (schemas == nullptr) FASTCL_TORCH(aoti_torch_library_init_fragment, name, __FILE__, __LINE__, &schemas);
      FASTCL_TORCH(aoti_torch_library_def, schemas, e.schema);
    }
    FASTCL_TORCH(torch_library_impl, library, e.name, e.kernel, torch_abi_version);
  }
}

}  // namespace fastcl

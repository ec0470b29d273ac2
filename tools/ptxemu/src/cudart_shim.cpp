// cudart_shim.cpp - the part of the CUDA runtime that launch code uses, on top of the interpreter. Linked
// into a library built by nvcc in place of libcudart: the <<<>>> stubs arrive in cudaLaunchKernel, "device"
// memory is the guarded memory of the current call. A runtime function that is missing here is a link error.
#include <cuda_runtime_api.h>
#include <cstdint>
#include <cstdio>
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

extern "C" {
const char* ptxemu_result();
const char* ptxemu_module_info(void*);
int ptxemu_launch(void*, const char*, const unsigned*, const unsigned*, const unsigned*, unsigned, const void*,
                  unsigned, void*, const void*);
uint64_t ptxemu_memory_allocate(void*, uint64_t, uint64_t);
void ptxemu_memory_release(void*, uint64_t);
int ptxemu_memory_valid(void*, uint64_t, uint64_t);
int ptxemu_memory_uninitialized(void*, uint64_t, uint64_t);
void* ptxemu_memory_new();
int ptxemu_tensor_map_encode(void*, int, unsigned, uint64_t, const uint64_t*, const uint64_t*, const uint32_t*,
                             const uint32_t*, int, int, int, int);
}

namespace {

struct Config {
    dim3 grid, block;
    size_t shared;
    void* stream;
};
struct KernelInfo {
    void* module = nullptr;
    std::vector<std::pair<unsigned, unsigned>> params;
    unsigned param_bytes = 0, static_shared = 0;
};
// What one HostLibrary launches from. Several may stand on one file, which a process loads once.
struct Table {
    std::map<std::string, KernelInfo> kernels;
    std::map<std::string, uint64_t> symbols;
    int arch = 80;
};
struct State {
    std::map<const void*, std::string> functions;  // host stub -> kernel name
    std::map<const void*, std::string> variables;  // host shadow -> device variable
    std::vector<std::unique_ptr<Table>> tables;    // the last one is in use
    std::map<const void*, int> dynamic_limit;
    std::vector<Config> configs;
    std::vector<std::string> log;  // JSON, one entry per launch
    std::string text;
    void* memory = nullptr;
    const void* options = nullptr;
    cudaError_t last = cudaSuccess;
};
State& state() {
    static State* s = new State;
    return *s;
}
Table& table() {
    static Table none;
    return state().tables.empty() ? none : *state().tables.back();
}
auto find_table(void* t) {
    auto& all = state().tables;
    return std::find_if(all.begin(), all.end(), [=](auto& other) { return other.get() == t; });
}
cudaError_t fail(cudaError_t e) {
    if (e != cudaSuccess) state().last = e;
    return e;
}
int shared_limit() {
    return table().arch >= 90                         ? 232448
           : table().arch == 86 || table().arch == 89 ? 101376
           : table().arch == 75                       ? 65536
                                                      : 166912;
}

// The few fields needed of ptxemu_module_info, without a JSON library:
// "name":{"params":[["t",offset,size],...],"param_bytes":n,"shared":n
void read_info(void* module) {
    std::string j = ptxemu_module_info(module);
    size_t p = j.find("\"kernels\":{") + 11, end = j.find("},\"broken\":");
    while (p < end && j[p] != '}') {
        size_t a = j.find('"', p) + 1, b = j.find('"', a);
        std::string name = j.substr(a, b - a);
        KernelInfo k;
        k.module = module;
        size_t q = j.find("\"params\":[", b) + 10;
        while (j[q] == '[' || j[q] == ',') {
            q = j.find(',', j.find('[', q)) + 1;
            char* e;
            unsigned off = strtoul(&j[q], &e, 10), size = strtoul(e + 1, &e, 10);
            k.params.push_back({off, size});
            q = j.find(']', q) + 1;
        }
        k.param_bytes = strtoul(&j[j.find("\"param_bytes\":", q) + 14], nullptr, 10);
        k.static_shared = strtoul(&j[j.find("\"shared\":", q) + 9], nullptr, 10);
        table().kernels[name] = k;
        p = j.find('}', q) + 1;
        if (j[p] == ',') p++;
    }
    // broken kernels are still launched by name, so that the interpreter reports why
    p = j.find("\"broken\":{") + 10;
    end = j.find("},\"symbols\":{", p);
    while (p < end && j[p] == '"') {
        size_t b = j.find('"', p + 1);
        KernelInfo k;
        k.module = module;
        table().kernels[j.substr(p + 1, b - p - 1)] = k;
        size_t c = j.find("\":\"", p) + 3;
        while (!(j[c] == '"' && j[c - 1] != '\\')) c++;
        p = c + 1;
        if (j[p] == ',') p++;
    }
    p = j.find("\"symbols\":{", end) + 11;
    while (j[p] == '"') {
        size_t b = j.find('"', p + 1);
        char* e;
        table().symbols[j.substr(p + 1, b - p - 1)] = strtoull(&j[b + 3], &e, 10);
        p = j.find(']', b) + 1;
        if (j[p] == ',') p++;
    }
}

// cluster: null where the launch does not say.
cudaError_t launch(const void* f, dim3 g, dim3 b, void** args, size_t shared, const unsigned* cluster = nullptr) {
    State& s = state();
    auto it = s.functions.find(f);
    if (it == s.functions.end()) return fail(cudaErrorInvalidDeviceFunction);
    auto k = table().kernels.find(it->second);
    if (k == table().kernels.end()) return fail(cudaErrorInvalidDeviceFunction);
    auto lim = s.dynamic_limit.find(f);
    if (shared > (size_t)(lim == s.dynamic_limit.end() ? 49152 - (int)k->second.static_shared : lim->second))
        return fail(cudaErrorInvalidValue);
    if (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z || (uint64_t)b.x * b.y * b.z > 1024 || b.z > 64 ||
        g.y > 65535 || g.z > 65535)
        return fail(cudaErrorInvalidConfiguration);
    std::vector<char> params(k->second.param_bytes);
    for (size_t i = 0; i < k->second.params.size(); i++)
        memcpy(&params[k->second.params[i].first], args[i], k->second.params[i].second);
    unsigned grid[3] = {g.x, g.y, g.z}, block[3] = {b.x, b.y, b.z};
    int bad = ptxemu_launch(k->second.module, it->second.c_str(), grid, block, cluster, (unsigned)shared,
                            params.data(), (unsigned)params.size(), s.memory, s.options);
    s.log.push_back(ptxemu_result());
    return bad ? fail(cudaErrorIllegalAddress) : cudaSuccess;
}

}  // namespace

extern "C" {

// A table of these modules, in use from now on.
void* ptxemu_shim_setup(int n, void** modules, int arch) {
    state().tables.emplace_back(new Table);
    table().arch = arch;
    for (int i = 0; i < n; i++) read_info(modules[i]);
    return &table();
}
void ptxemu_shim_use(void* t) {
    auto place = find_table(t);
    std::rotate(place, place + 1, state().tables.end());
}
// The modules are about to go; what was in use before is in use again.
void ptxemu_shim_drop(void* t) { state().tables.erase(find_table(t)); }
void ptxemu_shim_begin(void* memory, const void* options) {
    state().memory = memory;
    state().options = options;
    state().log.clear();
    state().last = cudaSuccess;
}
const char* ptxemu_shim_end() {
    std::string& t = state().text;
    t = "[";
    for (auto& l : state().log) t += (t.size() > 1 ? "," : "") + l;
    t += "]";
    return t.c_str();
}

// --- what nvcc's generated code calls ---
void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
    state().functions[host] = name;
}
void __cudaRegisterVar(void**, char* host, char*, const char* name, int, size_t, int, int) {
    state().variables[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t shared, void* stream) {
    state().configs.push_back({g, b, shared, stream});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* shared, void* stream) {
    Config c = state().configs.back();
    state().configs.pop_back();
    *g = c.grid;
    *b = c.block;
    *shared = c.shared;
    *(void**)stream = c.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
    *k = (cudaKernel_t)f;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t) {
    return launch((const void*)f, g, b, args, shared);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t f, dim3 g, dim3 b, void** args, size_t shared,
                                    cudaStream_t) {
    return launch((const void*)f, g, b, args, shared);
}

// --- the runtime API ---
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t) {
    return launch(f, g, b, args, shared);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** args, size_t shared,
                                        cudaStream_t) {
    return launch(f, g, b, args, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
    for (unsigned i = 0; i < c->numAttrs; i++)
        if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) {
            const auto& d = c->attrs[i].val.clusterDim;
            if (!d.x || !d.y || !d.z || c->gridDim.x % d.x || c->gridDim.y % d.y || c->gridDim.z % d.z || d.x * d.y * d.z > 8)
                return fail(cudaErrorInvalidConfiguration);
            const unsigned cluster[3] = {d.x, d.y, d.z};
            return launch(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, cluster);
        }
    return launch(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes);
}
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int v) {
    if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        auto it = state().functions.find(f);
        int fixed = it == state().functions.end() ? 0 : (int)table().kernels[it->second].static_shared;
        if (v < 0 || v + fixed > shared_limit()) return fail(cudaErrorInvalidValue);
        state().dynamic_limit[f] = v;
    }
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* f) {
    auto it = state().functions.find(f);
    if (it == state().functions.end()) return fail(cudaErrorInvalidDeviceFunction);
    memset(a, 0, sizeof *a);
    a->sharedSizeBytes = table().kernels[it->second].static_shared;
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 64;
    a->ptxVersion = a->binaryVersion = table().arch;
    a->maxDynamicSharedSizeBytes = state().dynamic_limit.count(f) ? state().dynamic_limit[f] : 49152;
    return cudaSuccess;
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaGetLastError() {
    cudaError_t e = state().last;
    state().last = cudaSuccess;
    return e;
}
cudaError_t cudaPeekAtLastError() { return state().last; }
const char* cudaGetErrorString(cudaError_t e) {
    switch (e) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorIllegalAddress: return "the interpreter reported a fault";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDeviceFunction: return "invalid device function";
        case cudaErrorNotSupported: return "operation not supported";
        case cudaErrorMemoryAllocation: return "out of memory";
        default: return "CUDA error";
    }
}
const char* cudaGetErrorName(cudaError_t e) {
    return e == cudaSuccess ? "cudaSuccess" : cudaGetErrorString(e);
}
cudaError_t cudaGetDevice(int* d) {
    *d = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int d) { return d ? fail(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) {
    *n = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
    switch (a) {
        case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = shared_limit(); break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = shared_limit() + 1024; break;
        case cudaDevAttrMultiProcessorCount: *v = table().arch >= 90 ? 132 : 108; break;
        case cudaDevAttrComputeCapabilityMajor: *v = table().arch / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *v = table().arch % 10; break;
        case cudaDevAttrWarpSize: *v = 32; break;
        case cudaDevAttrCooperativeLaunch: *v = 1; break;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: *v = 65536; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
        case cudaDevAttrL2CacheSize: *v = 40 << 20; break;
        case cudaDevAttrMaxGridDimX: *v = 0x7fffffff; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *v = 65535; break;
        default:
            fprintf(stderr, "ptxemu: cudaDeviceGetAttribute(%d) is not known\n", (int)a);
            return fail(cudaErrorNotSupported);
    }
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int threads,
                                                                   size_t shared, unsigned) {
    int by_threads = 2048 / (threads ? threads : 1),
        by_shared =
            shared ? (int)((shared_limit() + 1024) / (shared + 1024)) : 32;  // registers are not known here
    *n = by_threads < by_shared ? by_threads : by_shared;
    if (*n > 32) *n = 32;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, threads, shared, 0);
}

// The driver's functions that launch code takes by name, so that it needs no libcuda at link time.
static int encode_tiled(void* map, int type, unsigned rank, void* address, const uint64_t* dim, const uint64_t* stride,
                        const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int promotion, int fill) {
    return ptxemu_tensor_map_encode(map, type, rank, (uint64_t)address, dim, stride, box, step, interleave, swizzle,
                                    promotion, fill);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *f = strcmp(name, "cuTensorMapEncodeTiled") ? nullptr : (void*)encode_tiled;
    if (result) *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// Memory lives as long as the call that allocated it.
cudaError_t cudaMalloc(void** p, size_t n) {
    *p = (void*)ptxemu_memory_allocate(state().memory, n ? n : 1, 0);
    if (!*p) return fail(cudaErrorMemoryAllocation);
    ptxemu_memory_uninitialized(state().memory, (uint64_t)*p, n);
    return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
    if (p) ptxemu_memory_release(state().memory, (uint64_t)p);
    return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
void ptxemu_memory_defined(void*, uint64_t, uint64_t);
cudaError_t cudaMemset(void* p, int v, size_t n) {
    if (!ptxemu_memory_valid(state().memory, (uint64_t)p, n)) return fail(cudaErrorInvalidValue);
    memset(p, v, n);
    ptxemu_memory_defined(state().memory, (uint64_t)p, n);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { return cudaMemset(p, v, n); }
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
    memcpy(d, s, n);
    if (ptxemu_memory_valid(state().memory, (uint64_t)d, n))
        ptxemu_memory_defined(state().memory, (uint64_t)d, n);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t) {
    return cudaMemcpy(d, s, n, k);
}
static char* symbol_address(const void* v) {
    auto it = state().variables.find(v);
    if (it == state().variables.end()) return nullptr;
    auto s = table().symbols.find(it->second);
    return s == table().symbols.end() ? nullptr : (char*)s->second;
}
cudaError_t cudaMemcpyToSymbol(const void* v, const void* s, size_t n, size_t off, cudaMemcpyKind) {
    char* d = symbol_address(v);
    if (!d) return fail(cudaErrorInvalidSymbol);
    memcpy(d + off, s, n);
    return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void* d, const void* v, size_t n, size_t off, cudaMemcpyKind) {
    char* s = symbol_address(v);
    if (!s) return fail(cudaErrorInvalidSymbol);
    memcpy(d, s + off, n);
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** p, const void* v) {
    *p = symbol_address(v);
    return *p ? cudaSuccess : fail(cudaErrorInvalidSymbol);
}

cudaError_t cudaDeviceSynchronize() { return state().last; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return state().last; }
cudaError_t cudaStreamCreate(cudaStream_t* s) {
    *s = nullptr;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
    *s = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) {
    *e = nullptr;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
    *e = nullptr;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

}  // extern "C"

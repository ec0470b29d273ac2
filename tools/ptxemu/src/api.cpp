// api.cpp - the C interface used through ctypes and by the CUDA runtime shim. Results travel as JSON text.
#include <sstream>
#include "machine.h"

using namespace ptx;

namespace {

std::string quote(const std::string& s) {
    std::string r = "\"";
    for (unsigned char c : s) {
        if (c == '"' || c == '\\') {
            r += '\\';
            r += (char)c;
        } else if (c == '\n') r += "\\n";
        else if (c < 0x20) {
            char b[8];
            snprintf(b, sizeof b, "\\u%04x", c);
            r += b;
        } else r += (char)c;
    }
    return r + "\"";
}
std::string fault_json(const Fault& f) {
    std::ostringstream o;
    o << "{\"error\":" << quote(fault_name(f.kind)) << ",\"message\":" << quote(f.what())
      << ",\"line\":" << f.line << ",\"text\":" << quote(f.text) << ",\"source\":" << quote(f.source);
    if (f.has_thread)
        o << ",\"cta\":[" << f.cta[0] << "," << f.cta[1] << "," << f.cta[2] << "],\"thread\":[" << f.thread[0]
          << "," << f.thread[1] << "," << f.thread[2] << "]";
    if (f.has_address) o << ",\"address\":" << f.address;
    o << "}";
    return o.str();
}
const char* class_name(Cls c) {
    static const char* n[] = {"other",  "fp32",   "fp16",  "fp64",   "int",     "mufu",    "tensor",
                              "global", "shared", "local", "atomic", "control", "convert", "sync"};
    return n[(int)c];
}
std::string stats_json(const Launch& l) {
    std::ostringstream o;
    const Counters& c = l.counters;
    u64 ctas = (u64)l.grid[0] * l.grid[1] * l.grid[2];
    o << "{\"kernel\":" << quote(l.kernel->name) << ",\"arch\":" << l.module->arch << ",\"ctas\":" << ctas
      << ",\"cluster\":" << l.cluster[0] * l.cluster[1] * l.cluster[2] << ",\"threads_per_cta\":" << threads_per_cta(l)
      << ",\"shared_bytes\":" << l.dynamic_base + l.dynamic_shared << ",\"seconds\":" << l.seconds
      << ",\"host_threads\":" << l.threads_used << ",\"instructions\":" << c.instructions
      << ",\"touched_bytes\":" << l.memory->touched_bytes() << ",\"sites\":[";
    bool first = true;
    for (size_t k = 0; k < l.kernel->code.size(); k++) {
        const Inst& i = l.kernel->code[k];
        if (!c.executed[k]) continue;
        const SiteStats& s = c.sites[k];
        o << (first ? "" : ",") << "[" << i.line << "," << quote(i.opcode) << ",\"" << class_name(i.cls)
          << "\"," << c.executed[k] << "," << c.lanes[k] << "," << i.flops << ",\"" << type_name(i.type2)
          << "\"," << s.accesses << "," << s.bytes << "," << s.units << "," << s.ideal << "," << i.loc << "]";
        first = false;
    }
    o << "]}";
    return o.str();
}

thread_local std::string g_result;

}  // namespace

extern "C" {

struct ptxemu_options {
    u64 seed, max_instructions;
    u32 threads, shared_races, global_races, strict_same_value, init_shared, init_global, registers,
        rounding_nearest, approx_noise, smem_limit, warp_races;
};

const char* ptxemu_result() { return g_result.c_str(); }

void* ptxemu_module_load(const char* text) {
    try {
        return parse_module(text).release();
    } catch (const Fault& f) {
        g_result = fault_json(f);
        return nullptr;
    }
}
void ptxemu_module_free(void* m) { delete (Module*)m; }

// JSON: {"kernels": {name: {params, shared, local, reqntid, lines}}, "broken": {name: reason}}
const char* ptxemu_module_info(void* mp) {
    Module& m = *(Module*)mp;
    std::ostringstream o;
    o << "{\"target\":" << quote(m.target) << ",\"kernels\":{";
    bool first = true;
    for (auto& name : m.order) {
        auto it = m.kernels.find(name);
        if (it == m.kernels.end()) continue;
        Kernel& k = *it->second;
        o << (first ? "" : ",") << quote(name) << ":{\"params\":[";
        for (size_t p = 0; p < k.params.size(); p++)
            o << (p ? "," : "") << "[\"" << type_name(k.params[p].type) << "\"," << k.params[p].offset << ","
              << k.params[p].size << "]";
        o << "],\"param_bytes\":" << k.param_bytes << ",\"shared\":" << k.shared_static
          << ",\"local\":" << k.local_bytes << ",\"reqntid\":" << k.reqntid
          << ",\"instructions\":" << k.code.size() << "}";
        first = false;
    }
    o << "},\"broken\":{";
    first = true;
    for (auto& b : m.broken) {
        o << (first ? "" : ",") << quote(b.first) << ":" << quote(b.second);
        first = false;
    }
    o << "},\"symbols\":{";
    first = true;
    for (auto& s : m.symbols)
        if (s.second.space == Space::Global || s.second.space == Space::Const) {
            o << (first ? "" : ",") << quote(s.first) << ":[" << s.second.address << "," << s.second.size
              << "]";
            first = false;
        }
    o << "}}";
    g_result = o.str();
    return g_result.c_str();
}

void* ptxemu_memory_new() { return new MemoryMap; }
void ptxemu_memory_free(void* m) { delete (MemoryMap*)m; }
u64 ptxemu_memory_allocate(void* m, u64 size, u64 low_bits) {
    try {
        return ((MemoryMap*)m)->allocate(size, low_bits);
    } catch (const Fault& f) {
        g_result = fault_json(f);
        return 0;
    }
}
void ptxemu_memory_release(void* m, u64 base) { ((MemoryMap*)m)->free(base); }
void ptxemu_memory_add(void* m, u64 base, u64 size) { ((MemoryMap*)m)->add(base, size); }
int ptxemu_memory_uninitialized(void* m, u64 base, u64 size) {
    try {
        ((MemoryMap*)m)->set_uninitialized(base, size);
        return 0;
    } catch (const Fault& f) {
        g_result = fault_json(f);
        return 1;
    }
}
void ptxemu_memory_defined(void* m, u64 base, u64 size) { ((MemoryMap*)m)->set_defined(base, size); }
void ptxemu_memory_read_only(void* m, u64 base, int on) { ((MemoryMap*)m)->set_read_only(base, on); }
int ptxemu_memory_valid(void* m, u64 base, u64 size) { return ((MemoryMap*)m)->find(base, size) != nullptr; }

// 0: ptxemu_result() holds the statistics; 1: it holds the error.
// cluster: null, or all 0: as the kernel was compiled.
int ptxemu_launch(void* mp, const char* kernel, const u32* grid, const u32* block, const u32* cluster, u32 dynamic_shared,
                  const void* params, u32 param_bytes, void* memory, const ptxemu_options* o) {
    try {
        Module& m = *(Module*)mp;
        auto it = m.kernels.find(kernel);
        if (it == m.kernels.end()) {
            auto b = m.broken.find(kernel);
            if (b != m.broken.end())
                throw Fault(FaultKind::Unsupported,
                            "kernel " + b->first + " cannot be executed: " + b->second);
            throw Fault(FaultKind::Launch, std::string("no kernel named ") + kernel);
        }
        Launch l;
        l.module = &m;
        l.kernel = it->second.get();
        l.memory = (MemoryMap*)memory;
        memcpy(l.grid, grid, sizeof l.grid);
        memcpy(l.block, block, sizeof l.block);
        if (cluster) memcpy(l.cluster, cluster, sizeof l.cluster);
        l.dynamic_shared = dynamic_shared;
        if (param_bytes != l.kernel->param_bytes)
            throw Fault(FaultKind::Launch, "the kernel takes " + std::to_string(l.kernel->param_bytes) +
                                               " bytes of parameters, got " + std::to_string(param_bytes));
        l.params.assign((const u8*)params, (const u8*)params + param_bytes);
        Options& x = l.options;
        x.seed = o->seed;
        x.threads = o->threads;
        x.shared_races = o->shared_races;
        x.global_races = o->global_races;
        x.strict_same_value = o->strict_same_value;
        x.init_shared = o->init_shared;
        x.init_global = o->init_global;
        x.registers = o->registers;
        x.rounding_nearest = o->rounding_nearest;
        x.approx_noise = o->approx_noise;
        x.max_instructions = o->max_instructions;
        x.smem_limit = o->smem_limit;
        x.warp_races = o->warp_races;
        l.run();
        g_result = stats_json(l);
        return 0;
    } catch (const Fault& f) {
        g_result = fault_json(f);
        return 1;
    } catch (const std::exception& e) {
        g_result = fault_json(Fault(FaultKind::Launch, e.what()));
        return 1;
    }
}

}  // extern "C"

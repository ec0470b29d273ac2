// fault.h - everything that can go wrong is a Fault: what, where in the PTX, which thread, which address.
#pragma once
#include <stdexcept>
#include <string>
#include "types.h"

namespace ptx {

enum class FaultKind : u8 {
    Unsupported,
    Syntax,
    Launch,
    OutOfBounds,
    Misaligned,
    SharedRace,
    GlobalRace,
    Uninitialized,
    MissingWait,
    Divergence,
    Deadlock,
    Trap,
    ReadOnly,
    UninitializedRegister,
};
inline const char* fault_name(FaultKind k) {
    static const char* names[] = {
        "Unsupported", "Syntax",     "Launch",        "OutOfBounds",          "Misaligned",
        "SharedRace",  "GlobalRace", "Uninitialized", "MissingWait",          "Divergence",
        "Deadlock",    "Trap",       "ReadOnly",      "UninitializedRegister"};
    return names[(int)k];
}

struct Fault : std::runtime_error {
    FaultKind kind;
    int line = 0;        // PTX line, 0 when unknown
    std::string text;    // the PTX instruction
    std::string source;  // "file:line" from .loc, if any
    bool has_thread = false;
    u32 cta[3] = {0, 0, 0}, thread[3] = {0, 0, 0};
    u64 cta_linear = 0;
    bool has_address = false;
    u64 address = 0;
    Fault(FaultKind k, const std::string& message) : std::runtime_error(message), kind(k) {}
};

}  // namespace ptx

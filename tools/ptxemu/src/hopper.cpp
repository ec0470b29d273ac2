// hopper.cpp - what else sm_90 adds: the proxy fences around asynchronous copies and matrix operations, and
// griddepcontrol and setmaxnreg, which change nothing here.
#include "decode.h"
#include "machine.h"
#include "cluster.h"
#include "memory_access.h"

namespace ptx {
namespace {

void proxy_fence(Warp& w, const Inst&, u32) { w.cta->shared.proxy_fence(w.place); }

}  // namespace

bool decode_hopper(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
    if (op == "fence" && d.take("mbarrier_init")) {
        d.take("release");
        d.take("cluster");
        i.run = fence_cluster;
        i.cls = Cls::Sync;
        return true;
    }
    if (op == "fence" && d.take("proxy")) {
        if (!d.take("async") && !d.take("async::generic")) {
            if (d.take("alias")) {
                i.run = nothing;
                i.cls = Cls::Sync;
                return true;
            }
            d.unsupported("proxy");
        }
        d.take("shared::cta") || d.take("global") || d.take("shared");
        i.run = proxy_fence;
        i.cls = Cls::Sync;
        return true;
    }
    if (op == "griddepcontrol") {
        if (!d.take("wait") && !d.take("launch_dependents")) d.unsupported("griddepcontrol");
        i.run = nothing;
        i.cls = Cls::Sync;
        return true;
    }
    if (op == "setmaxnreg") {
        if (!(d.take("inc") || d.take("dec")) || !d.take("sync") || !d.take("aligned"))
            d.unsupported("setmaxnreg");
        d.take_type();
        i.run = nothing;
        i.flow = Flow::Aligned;
        i.cls = Cls::Other;
        return true;
    }
    return false;
}

}  // namespace ptx

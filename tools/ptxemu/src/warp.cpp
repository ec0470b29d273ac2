// warp.cpp - a warp as a set of converged lanes ("splits").
//
// The split with the smallest program counter runs; splits that meet at the same pc merge. A .sync or .aligned
// instruction waits until the lanes it names have arrived, and it is an error if they cannot.
#include "cluster.h"

namespace ptx {

void describe(Fault& f, const Warp& w, const Inst& i, int lane) {
    Launch& l = *w.cta->launch;
    f.line = i.line;
    f.text = i.text;
    if (i.loc) {
        auto it = l.module->files.find(i.file);
        f.source = (it == l.module->files.end() ? "file " + std::to_string(i.file) : it->second) + ":" +
                   std::to_string(i.loc);
    }
    memcpy(f.cta, w.cta->id, sizeof f.cta);
    f.cta_linear = w.cta->linear;
    if (lane < 0) lane = w.active ? __builtin_ctz(w.active) : 0;
    u32 t = w.thread0 + lane;
    f.has_thread = true;
    f.thread[0] = t % l.block[0];
    f.thread[1] = t / l.block[0] % l.block[1];
    f.thread[2] = t / l.block[0] / l.block[1];
}

void Warp::fail(FaultKind kind, const std::string& message, int lane, bool has_address, u64 address) const {
    Fault f(kind, message);
    describe(f, *this, *current, lane);
    f.has_address = has_address;
    f.address = address;
    throw f;
}
std::string lanes_text(u32 m) {
    char b[16];
    snprintf(b, sizeof b, "0x%08x", m);
    return b;
}

// May this split execute the synchronising instruction it stands at? 'm' is its guarded mask.
static bool may_pass(Warp& w, const Inst& i, const Split& s, u32 m) {
    if (i.flow == Flow::WarpSync) {
        u32 need = 0, *mem = w.r32((u32)i.member);
        for_lanes(m, [&](int l) {
            if (!(mem[l] >> l & 1))
                w.fail(FaultKind::Divergence,
                       "the executing thread is not in its own membermask " + lanes_text(mem[l]), l);
            need |= mem[l];
        });
        u32 skipped = need & s.mask & ~m;
        if (skipped)
            w.fail(FaultKind::Divergence,
                   "lanes " + lanes_text(skipped) + " of the membermask are predicated off",
                   __builtin_ctz(skipped));
        return !(need & w.live & ~m);
    }
    if (m != s.mask)
        w.fail(FaultKind::Divergence,
               ".aligned instruction under a predicate that differs within the warp (active " +
                   lanes_text(m) + " of " + lanes_text(s.mask) + ")");
    if (i.flow == Flow::Aligned) {
        u32 lost = ~w.live;
        if (lost)
            w.fail(FaultKind::Divergence, ".aligned instruction needs the whole warp, lanes " +
                                              lanes_text(lost) + " have exited or do not exist");
        return m == ~0u;
    }
    return m == w.live;
}

// The ready split with the smallest pc; if none is ready, a waiting one whose partners have arrived or exited. What polls in
// vain gives way until all have, so that lanes of one warp may wait for one another.
int Warp::choose() {
    int pick = -1;
    for (int turn = 0; turn < 2 && pick < 0; turn++) {
        for (size_t k = 0; k < splits.size(); k++)
            if (splits[k].state == Split::Ready && !splits[k].polled && (pick < 0 || splits[k].pc < splits[pick].pc))
                pick = (int)k;
        if (pick < 0)
            for (auto& s : splits) s.polled = false;
    }
    for (size_t k = 0; k < splits.size() && pick < 0; k++)
        if (splits[k].state == Split::WaitWarp) {
            current = &cta->kernel->code[splits[k].pc];
            active = enabled(*current, splits[k]);
            if (may_pass(*this, *current, splits[k], active)) pick = (int)k;
        }
    if (pick >= 0) splits[pick].state = Split::Ready;
    return pick;
}

void Warp::count(const Inst& i, u32 m) {
    Counters& n = *cta->counters;
    n.executed[i.index]++;
    n.lanes[i.index] += __builtin_popcount(m);
    n.instructions++;
}

void Warp::branch(const Inst& i, Turn& t, u32 m) {
    if (u32 rest = t.s.mask & ~m) {
        splits[t.pick] = {t.s.pc + 1, rest};
        t.s = {(u32)i.target, m};
        splits.push_back(t.s);
        t.pick = (int)splits.size() - 1;
        t.alone = false;
    } else t.s.pc = (u32)i.target;
}

// brx.idx: one split for each target.
void Warp::branch_indexed(const Inst& i, Turn& t, u32 m) {
    u32* idx = r32(i.s0);
    std::vector<Split> out;
    if (u32 rest = t.s.mask & ~m) out.push_back({t.s.pc + 1, rest});
    for_lanes(m, [&](int l) {
        if (idx[l] >= i.targets.size()) fail(FaultKind::OutOfBounds, "brx.idx index out of range", l);
        u32 to = (u32)i.targets[idx[l]];
        for (auto& o : out)
            if (o.pc == to) {
                o.mask |= 1u << l;
                return;
            }
        out.push_back({to, 1u << l});
    });
    splits.erase(splits.begin() + t.pick);
    for (auto& o : out) splits.push_back(o);
}

// True when lanes of the split are left.
bool Warp::leave(Turn& t, u32 m) {
    live &= ~m;
    t.s.mask &= ~m;
    t.s.pc++;
    cta->live_threads -= (u32)__builtin_popcount(m);
    cta->events++;
    if (!cp_async.empty() && !live)
        fail(FaultKind::MissingWait, "the warp exits with cp.async operations in flight");
    if (!bulk.empty() && !live)
        fail(FaultKind::MissingWait, "the warp exits with bulk stores in flight: cp.async.bulk.wait_group is missing");
    cta->cluster->left(*this);
    cta->release_barriers();
    if (t.s.mask) return true;
    splits.erase(splits.begin() + t.pick);
    return false;
}

// False when the split has to wait for other lanes first.
bool Warp::barrier(const Inst& i, Turn& t, u32 m) {
    if (i.flag2) {
        if (m != t.s.mask) may_pass(*this, i, t.s, m);
        if (m != live) return false;
    }
    splits[t.pick] = t.s;
    count(i, m);
    if (m != t.s.mask) {
        splits[t.pick].mask = m;
        splits.push_back({t.s.pc + 1, t.s.mask & ~m});
    }
    cta->arrive(*this, i, splits[t.pick], m);
    return true;
}

Warp::Step Warp::wait_for_cluster(const Inst& i, Turn& t, u32 m) {
    if (i.flag2 && !may_pass(*this, i, t.s, m)) return Step::Waits;
    if (!cta->cluster->waits(*this, m)) {
        t.s.pc++;
        return Step::Stays;
    }
    splits[t.pick] = t.s;
    count(i, m);
    if (m != t.s.mask) splits.push_back({t.s.pc + 1, t.s.mask & ~m});
    Split& s = splits[t.pick];
    s.mask = m;
    s.pc++;
    s.state = Split::WaitBarrier;
    s.barrier = kClusterBarrier;
    return Step::Arrived;
}

// One instruction that is more than its handler.
Warp::Step Warp::step(const Inst& i, Turn& t, u32 m) {
    bool waits = false;
    switch (i.flow) {
        case Flow::Branch: branch(i, t, m); return Step::Stays;
        case Flow::BranchIndexed: branch_indexed(i, t, m); return Step::Leaves;
        case Flow::Exit: return leave(t, m) ? Step::Stays : Step::Leaves;
        case Flow::Barrier:
            if (barrier(i, t, m)) return Step::Arrived;
            waits = true;
            break;
        case Flow::ClusterWait: {
            const Step step = wait_for_cluster(i, t, m);
            if (step != Step::Waits) return step;
            waits = true;
            break;
        }
        case Flow::Poll: break;
        default: waits = !may_pass(*this, i, t.s, m);  // WarpSync, Aligned, AlignedLive
    }
    if (waits) {
        t.s.state = Split::WaitWarp;
        splits[t.pick] = t.s;
        return Step::Waits;
    }
    i.run(*this, i, m);
    t.s.pc++;
    return Step::Stays;
}

// Merge with splits at the same pc; true when one further behind should go first.
bool Warp::merge(Turn& t) {
    splits[t.pick] = t.s;
    bool behind = false;
    for (size_t k = 0; k < splits.size(); k++) {
        if ((int)k == t.pick || splits[k].state == Split::WaitBarrier) continue;
        if (splits[k].pc == t.s.pc) {
            t.s.mask |= splits[k].mask;
            splits[t.pick] = t.s;
            splits.erase(splits.begin() + k);
            if ((int)k < t.pick) t.pick--;
            k--;
        } else if (splits[k].pc < t.s.pc && splits[k].state == Split::Ready) behind = true;
    }
    t.alone = splits.size() == 1;
    return behind;
}

// The turn of one split, until it ends, waits or gives way.
void Warp::run_split(Turn& t, u64& budget) {
    const Inst* code = cta->kernel->code.data();
    const bool track = cta->launch->options.registers;
    while (budget) {
        const Inst& i = code[t.s.pc];
        const u32 m = enabled(i, t.s);
        current = &i;
        active = m;
        budget--;
        if (track && i.guard >= 0) {
            check_guard(i, t.s.mask);
            if (i.unread == Unread::Makes) left_out(i, t.s.mask & ~m);
        }
        if (!m) {
            t.s.pc++;
        } else {
            if (track) check_registers(i, m);
            if (__builtin_expect(!wgmma.empty(), 0)) check_wgmma(i);
            Step step = Step::Stays;
            if (i.flow == Flow::Plain) {
                i.run(*this, i, m);
                t.s.pc++;
            } else step = this->step(i, t, m);
            if (step == Step::Waits) budget++;
            if (step == Step::Waits || step == Step::Arrived) return;
            count(i, m);
            if (track) written(i, m);
            if (step == Step::Leaves) return;
        }
        if (stalled) {
            t.s.polled = true;
            break;
        }
        if (!t.alone && merge(t)) return;
    }
    splits[t.pick] = t.s;
}

void Warp::run(u64& budget) {
    stalled = false;
    while (budget && live && !stalled) {
        int pick = choose();
        if (pick < 0) return;
        Turn t{splits[pick], pick, splits.size() == 1};
        run_split(t, budget);
    }
}

}  // namespace ptx

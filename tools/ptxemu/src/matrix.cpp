// matrix.cpp - warp-level matrix instructions: mma.sync, ldmatrix, stmatrix, movmatrix.
//
// Fragment layouts (PTX ISA "Matrix Fragments for mma.m16n8k*"), with g = lane / 4, q = lane % 4 and 4-byte
// registers that hold e elements: register r of A covers row g + 8 * (r % 2), columns e*q + 4*e*(r / 2) ...;
// register r of B covers column g, rows e*q + 4*e*r ...; f32 register r of C/D is element (g + 8 * (r / 2),
// 2*q + r % 2).
//
// Numerics. Products of f16, bf16, tf32 and fp8 are exact. The hardware adds a block of them (k = 8 elements
// of 16 bits on sm_80, 16 on sm_90; half as many for tf32) and the accumulator in one wide fixed-point sum
// and truncates. Here a block is summed in double, the accumulator is added, and the result is rounded toward
// zero to f32 (Options::rounding_nearest: to nearest). The alignment truncation inside the hardware adder (a
// few low-order bits of terms much smaller than the largest) is not modelled. tf32 operands: the low 13 bits
// of the f32 registers are ignored (truncation).
#include "decode.h"
#include "machine.h"
#include "matrix.h"

namespace ptx {

using v8d = double __attribute__((vector_size(64)));
using v8f = float __attribute__((vector_size(32)));
using v8i = int __attribute__((vector_size(32)));
using v8l = long __attribute__((vector_size(64)));

static inline v8d round_f32_zero(v8d x) {
    v8f f = __builtin_convertvector(x, v8f);
    v8d back = __builtin_convertvector(f, v8d);
    const v8l magnitude = {0x7fffffffffffffff, 0x7fffffffffffffff, 0x7fffffffffffffff, 0x7fffffffffffffff,
                           0x7fffffffffffffff, 0x7fffffffffffffff, 0x7fffffffffffffff, 0x7fffffffffffffff};
    v8l above = (v8d)((v8l)back & magnitude) > (v8d)((v8l)x & magnitude);
    v8i bits = (v8i)f + __builtin_convertvector(above, v8i);  // one ulp toward zero
    return __builtin_convertvector((v8f)bits, v8d);
}

// C[rows][8] += A[rows][K] * B[K][8] in blocks of k, each rounded to f32.
void matrix_multiply(const float* A, int lda, const float* B, int ldb, float* C, int ldc, int rows, int K,
                     int block, bool nearest) {
    v8d b[64];
    for (int k = 0; k < K; k++)
        for (int n = 0; n < 8; n++) b[k][n] = B[k * ldb + n];
    for (int i = 0; i < rows; i++) {
        v8d acc;
        for (int n = 0; n < 8; n++) acc[n] = C[i * ldc + n];
        for (int k0 = 0; k0 < K; k0 += block) {
            v8d s = {};
            for (int k = k0; k < k0 + block; k++) s += (double)A[i * lda + k] * b[k];
            acc += s;
            acc = nearest ? __builtin_convertvector(__builtin_convertvector(acc, v8f), v8d)
                          : round_f32_zero(acc);
        }
        for (int n = 0; n < 8; n++) {
            float f = (float)acc[n];
            C[i * ldc + n] = f != f ? as_f32(0x7fffffff) : f;
        }
    }
}

// One packed 32-bit register to floats.
void unpack_elements(u32 v, Type t, float* out) {
    switch (t) {
        case Type::F16:
            out[0] = half_to_float(v & 0xffff);
            out[1] = half_to_float(v >> 16);
            break;
        case Type::BF16:
            out[0] = as_f32(v << 16);
            out[1] = as_f32(v & 0xffff0000u);
            break;
        default: out[0] = as_f32(v & ~0x1fffu); break;  // tf32
    }
}

int mma_block(int arch, Type t) {
    int b = arch >= 90 ? 16 : 8;
    return t == Type::TF32 ? b / 2 : b;
}

namespace {

// inst.sub: K, inst.sub2: registers of A, inst.vec: registers of B; s: A, B, C registers.
template <Type T>
void mma_float(Warp& w, const Inst& i, u32) {
    const int K = i.sub, na = i.sub2, nb = i.vec, e = T == Type::TF32 ? 1 : 2, words = K / e;
    u32 a32[16][8], b32[8][8];
    for (int r = 0; r < na; r++) {
        u32* p = w.r32(i.s[r]);
        for (int g = 0; g < 8; g++) memcpy(&a32[g + 8 * (r & 1)][4 * (r >> 1)], p + 4 * g, 16);
    }
    for (int r = 0; r < nb; r++) {
        u32* p = w.r32(i.s[na + r]);
        for (int g = 0; g < 8; g++) memcpy(&b32[g][4 * r], p + 4 * g, 16);
    }
    float A[16][16], B[16][8], C[16][8];
    for (int m = 0; m < 16; m++)
        for (int c = 0; c < words; c++) unpack_elements(a32[m][c], T, &A[m][c * e]);
    for (int n = 0; n < 8; n++)
        for (int c = 0; c < words; c++) {
            float v[2];
            unpack_elements(b32[n][c], T, v);
            for (int k = 0; k < e; k++) B[c * e + k][n] = v[k];
        }
    const bool half = i.type == Type::F16;  // f16 accumulators: two packed registers
    for (int r = 0; r < (half ? 2 : 4); r++) {
        u32* p = w.r32(i.s[na + nb + r]);
        for (int l = 0; l < 32; l++) {
            if (half) {
                C[(l >> 2) + 8 * r][(l & 3) * 2] = half_to_float(p[l] & 0xffff);
                C[(l >> 2) + 8 * r][(l & 3) * 2 + 1] = half_to_float(p[l] >> 16);
            } else C[(l >> 2) + 8 * (r >> 1)][(l & 3) * 2 + (r & 1)] = as_f32(p[l]);
        }
    }
    matrix_multiply(&A[0][0], 16, &B[0][0], 8, &C[0][0], 8, 16, K,
                    std::min(K, mma_block(w.cta->launch->module->arch, T)),
                    w.cta->launch->options.rounding_nearest);
    for (int r = 0; r < (half ? 2 : 4); r++) {
        u32* p = w.r32(i.d[r]);
        for (int l = 0; l < 32; l++) {
            if (half)
                p[l] = float_to_half(C[(l >> 2) + 8 * r][(l & 3) * 2]) |
                       float_to_half(C[(l >> 2) + 8 * r][(l & 3) * 2 + 1]) << 16;
            else p[l] = as_bits(C[(l >> 2) + 8 * (r >> 1)][(l & 3) * 2 + (r & 1)]);
        }
    }
}
void mma_int8(Warp& w, const Inst& i, u32) {  // s32 accumulate; flag/flag2: A/B signed; offset: satfinite
    const int K = i.sub, na = i.sub2, nb = i.vec;
    s32 A[16][32], B[32][8];
    for (int l = 0; l < 32; l++) {
        int g = l >> 2, q = l & 3;
        for (int r = 0; r < na; r++) {
            u32 v = w.r32(i.s[r])[l];
            for (int k = 0; k < 4; k++)
                A[g + 8 * (r & 1)][4 * q + 16 * (r >> 1) + k] =
                    i.flag ? (s32)(s8)(v >> 8 * k) : (s32)(u8)(v >> 8 * k);
        }
        for (int r = 0; r < nb; r++) {
            u32 v = w.r32(i.s[na + r])[l];
            for (int k = 0; k < 4; k++)
                B[4 * q + 16 * r + k][g] = i.flag2 ? (s32)(s8)(v >> 8 * k) : (s32)(u8)(v >> 8 * k);
        }
    }
    for (int r = 0; r < 4; r++) {
        u32 c[32];
        memcpy(c, w.r32(i.s[na + nb + r]), sizeof c);
        for (int l = 0; l < 32; l++) {
            int row = (l >> 2) + 8 * (r >> 1), col = (l & 3) * 2 + (r & 1);
            s64 v = (s32)c[l];
            for (int k = 0; k < K; k++) v += (s64)A[row][k] * B[k][col];
            w.r32(i.d[r])[l] =
                i.offset ? (u32)(s32)std::min<s64>(std::max<s64>(v, INT32_MIN), INT32_MAX) : (u32)v;
        }
    }
}
void mma_f64(Warp& w, const Inst& i,
             u32) {  // m8n8k4: A (l/4, l%4), B (l%4, l/4), C (l/4, 2*(l%4)+r); IEEE fma chain
    double A[8][4], B[4][8], C[8][8];
    for (int l = 0; l < 32; l++) {
        A[l >> 2][l & 3] = as_f64(w.r64(i.s[0])[l]);
        B[l & 3][l >> 2] = as_f64(w.r64(i.s[1])[l]);
        for (int r = 0; r < 2; r++) C[l >> 2][(l & 3) * 2 + r] = as_f64(w.r64(i.s[2 + r])[l]);
    }
    for (auto m = 0; m < 8; m++)
        for (int n = 0; n < 8; n++)
            for (int k = 0; k < 4; k++) C[m][n] = std::fma(A[m][k], B[k][n], C[m][n]);
    for (int l = 0; l < 32; l++)
        for (int r = 0; r < 2; r++) w.r64(i.d[r])[l] = as_bits(C[l >> 2][(l & 3) * 2 + r]);
}

void row_addresses(Warp& w, const Inst& i, u32* out) {
    for (int l = 0; l < 8 * i.vec; l++)
        out[l] = (u32)((i.flag2 ? (u64)w.r32(i.base)[l] : w.r64(i.base)[l] & ~kWindowMask) + i.offset);
}
// PTX ISA "ldmatrix": thread 8*k + r gives the address of row r of matrix k; thread l receives elements (l/4,
// 2*(l%4)) and the next of each matrix, or of its transpose.
void ldmatrix(Warp& w, const Inst& i, u32) {
    u32 addr[32], out[4][32];
    SharedMemory& s = w.cta->shared;
    row_addresses(w, i, addr);
    const int n = i.vec;
    for (int l = 0; l < 8 * n; l++) s.check(w, l, addr[l], 16, 16);
    for (int l = 0; l < 8 * n; l++) s.read(w, l, addr[l], 16);
    count_shared(w, n == 4 ? ~0u : (1u << 8 * n) - 1, addr, 16);
    for (int k = 0; k < n; k++) {
        u16 tile[8][8];
        for (int r = 0; r < 8; r++) memcpy(tile[r], s.data() + addr[8 * k + r], 16);
        for (int l = 0; l < 32; l++) {
            int g = l >> 2, q = 2 * (l & 3);
            out[k][l] =
                i.flag ? tile[q][g] | (u32)tile[q + 1][g] << 16 : tile[g][q] | (u32)tile[g][q + 1] << 16;
        }
    }
    for (int k = 0; k < n; k++) memcpy(w.r32(i.d[k]), out[k], 128);
}
void stmatrix(Warp& w, const Inst& i, u32) {
    u32 addr[32];
    SharedMemory& s = w.cta->shared;
    row_addresses(w, i, addr);
    for (int k = 0; k < i.vec; k++) {
        u16 tile[8][8];
        u32* v = w.r32(i.s[k]);
        for (int l = 0; l < 32; l++) {
            int g = l >> 2, q = 2 * (l & 3);
            if (i.flag) {
                tile[q][g] = (u16)v[l];
                tile[q + 1][g] = (u16)(v[l] >> 16);
            } else {
                tile[g][q] = (u16)v[l];
                tile[g][q + 1] = (u16)(v[l] >> 16);
            }
        }
        for (int r = 0; r < 8; r++) {
            u32 a = addr[8 * k + r];
            s.check(w, 8 * k + r, a, 16, 16);
            s.write(w, 8 * k + r, a, 16, tile[r]);
            memcpy(s.data() + a, tile[r], 16);
        }
    }
    count_shared(w, i.vec == 4 ? ~0u : (1u << 8 * i.vec) - 1, addr, 16);
}
void movmatrix(Warp& w, const Inst& i, u32) {
    u16 tile[8][8];
    u32* v = w.r32(i.s0);
    for (int l = 0; l < 32; l++) {
        tile[l >> 2][2 * (l & 3)] = (u16)v[l];
        tile[l >> 2][2 * (l & 3) + 1] = (u16)(v[l] >> 16);
    }
    u32* d = w.r32(i.d0);
    for (int l = 0; l < 32; l++) {
        int g = l >> 2, q = 2 * (l & 3);
        d[l] = tile[q][g] | (u32)tile[q + 1][g] << 16;
    }
}

void decode_move_matrix(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
    bool load = op == "ldmatrix";
    if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8")) d.unsupported("matrix shape");
    i.vec = d.take("x4") ? 4 : d.take("x2") ? 2 : d.take("x1") ? 1 : 0;
    i.flag = d.take("trans");
    Space s = d.take_space();
    if (d.need_type() != Type::B16 || !i.vec || (s != Space::Shared && s != Space::Generic))
        d.unsupported("ldmatrix form");
    d.expect(2);
    const Operand &a = d.operand(load ? 1 : 0), &v = d.operand(load ? 0 : 1);
    auto one = [&](const Operand& o) {
        if (load) i.d.push_back(d.dst(o, Type::B32));
        else i.s.push_back(d.src(o, Type::B32));
    };
    if (v.kind == Operand::Vector)
        for (auto& e : v.elems) one(e);
    else one(v);
    if ((int)(i.d.size() + i.s.size()) != i.vec) d.unsupported("vector size");
    d.address(a, Space::Shared);
    i.run = load ? ldmatrix : stmatrix;
    i.flow = Flow::Aligned;
    i.cls = Cls::Shared;
}

void decode_movmatrix(Decoder& d) {
    Inst& i = d.inst;
    if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8") || !d.take("trans") ||
        d.need_type() != Type::B16)
        d.unsupported("movmatrix form");
    d.expect(2);
    i.d0 = d.dst(0, Type::B32);
    i.s0 = d.src(1, Type::B32);
    i.run = movmatrix;
    i.flow = Flow::Aligned;
    i.cls = Cls::Int;
}

void decode_mma(Decoder& d) {
    Inst& i = d.inst;
    if (!d.take("sync") || !d.take("aligned")) d.unsupported("mma form");
    int shape = d.take_one({"m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m8n8k4"});
    if (shape < 0 || !d.take("row") || !d.take("col")) d.unsupported("mma shape or layout");
    bool sat = d.take("satfinite");
    auto types = d.rest();
    if (types.size() != 4) d.unsupported("mma types");
    Type t[4];
    for (int k = 0; k < 4; k++) {
        t[k] = type_from_name(types[k]);
        d.take(types[k]);
    }
    static const int ks[] = {4, 8, 16, 32, 4};
    int K = ks[shape];
    d.expect(4);
    auto collect = [&](const Operand& o, std::vector<u32>& out, Type et, bool dst) {
        auto one = [&](const Operand& e) { out.push_back(dst ? d.dst(e, et) : d.src(e, et)); };
        if (o.kind == Operand::Vector)
            for (auto& e : o.elems) one(e);
        else one(o);
    };
    i.flow = Flow::Aligned;
    i.cls = Cls::Tensor;
    i.type = t[0];
    i.type2 = t[1];
    bool f64 = t[0] == Type::F64;
    Type reg = f64 ? Type::F64 : Type::B32;
    collect(d.operand(0), i.d, reg, true);
    for (int k = 1; k < 4; k++) collect(d.operand(k), i.s, reg, false);
    i.flops = 2ull * (shape == 4 ? 8 : 16) * 8 * K;
    if (f64) {
        if (shape != 4 || t[1] != Type::F64 || t[2] != Type::F64 || t[3] != Type::F64 ||
            i.d.size() != 2 || i.s.size() != 4)
            d.unsupported("mma f64 form");
        i.run = mma_f64;
        return;
    }
    auto int8 = [](Type x) { return x == Type::S8 || x == Type::U8; };
    int eb = int8(t[1]) ? 1 : t[1] == Type::TF32 ? 4 : 2, na = K * eb / 8, nb = K * eb / 16;
    i.sub = (u8)K;
    i.sub2 = (u8)na;
    i.vec = (u8)nb;
    i.offset = sat;
    size_t nc = t[0] == Type::F16 ? 2 : 4;
    if (i.d.size() != nc || i.s.size() != na + nb + nc || shape == 4) d.unsupported("mma operand count");
    if (t[0] == Type::S32 && t[3] == Type::S32 && int8(t[1]) && int8(t[2]) && (K == 16 || K == 32)) {
        i.flag = t[1] == Type::S8;
        i.flag2 = t[2] == Type::S8;
        i.run = mma_int8;
        return;
    }
    bool acc = t[0] == t[3] && (t[0] == Type::F32 || (t[0] == Type::F16 && t[1] == Type::F16));
    if (!acc || t[1] != t[2] || sat) d.unsupported("mma type combination");
    if (t[1] == Type::BF16 && (K == 8 || K == 16)) i.run = mma_float<Type::BF16>;
    else if (t[1] == Type::F16 && (K == 8 || K == 16)) i.run = mma_float<Type::F16>;
    else if (t[1] == Type::TF32 && (K == 4 || K == 8)) i.run = mma_float<Type::TF32>;
    else d.unsupported("mma type combination");
}

const Family family = {
    {"ldmatrix", decode_move_matrix}, {"stmatrix", decode_move_matrix},
    {"movmatrix", decode_movmatrix}, {"mma", decode_mma},
};

}  // namespace

bool decode_matrix(Decoder& d) { return decode_of(family, d); }

}  // namespace ptx

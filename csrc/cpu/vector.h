// Vectors of the processor that this is compiled for, by the compilers' own vector types: AVX-512, AVX2, NEON or SSE.
//
// Of instructions that these do not know there is one, the product of pairs in bfloat16.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define ALWAYS inline __attribute__((always_inline))

namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;

#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int BYTES = 16, REGISTERS = 32;
#else
constexpr int BYTES = 16, REGISTERS = 16;
#endif

constexpr int LANES = BYTES / 4;

typedef float Vec __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
typedef float LooseVec __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

/// A bfloat16 number as it lies in memory.
struct Bf16 {
    uint16_t bits;
};

ALWAYS Vec all(float value) { return value - Vec{}; }

ALWAYS Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }

ALWAYS void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

ALWAYS Vec load(const Bf16* p) {
    const Words wide = __builtin_convertvector(Halves(*reinterpret_cast<const LooseHalves*>(p)), Words) << 16;
    return (Vec)wide;
}

/// Rounded to the nearest, to even where two are as near; NaN stays NaN.
ALWAYS void store(Bf16* p, Vec v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    const Words bits = (Words)v;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = v == v ? rounded : (bits >> 16) | 0x40;
    *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(rounded, Halves);
#endif
}

/// Copy fewer than 16 numbers.
template <typename T>
ALWAYS void copy_few(T* to, const T* from, int count) {
    if (count & 8) std::memcpy(to, from, 8 * sizeof(T)), to += 8, from += 8;
    if (count & 4) std::memcpy(to, from, 4 * sizeof(T)), to += 4, from += 4;
    if (count & 2) std::memcpy(to, from, 2 * sizeof(T)), to += 2, from += 2;
    if (count & 1) *to = *from;
}

/// The first `count` lanes, the others zero.
template <typename T>
ALWAYS Vec load(const T* p, int count) {
    if (count >= LANES) return load(p);
    T given[LANES] = {};
    copy_few(given, p, count);
    return load(given);
}

template <typename T>
ALWAYS void store(T* p, Vec v, int count) {
    if (count >= LANES) return store(p, v);
    T made[LANES];
    store(made, v);
    copy_few(p, made, count);
}

/// exp(x) to about 1 ulp from -87 to 88, exp(-87) below and infinity above. Source: S. Moshier, Cephes, `expf`.
inline Vec exponential(Vec x) {
    const Vec low = x < -87.0f ? all(-87.0f) : x;
    const Vec shifted = low * 1.44269504f + 12582912.0f;  // the nearest integer in the last bits
    const Vec n = shifted - 12582912.0f;
    const Vec r = low - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Words bits = ((Words)shifted << 23) + (127u << 23);
    return x > 88.0f ? all(std::numeric_limits<float>::infinity()) : p * (Vec)bits;
}

/// The lanes of x that an index names.
ALWAYS Words picked(Words x, Words index) {
#if defined(__clang__)
    Words y;
    for (int l = 0; l < LANES; l++) y[l] = x[index[l]];
    return y;
#else
    return __builtin_shuffle(x, index);
#endif
}

enum Activation { NONE, RELU, SILU, SIGMOID };

ALWAYS Vec activate(Vec z, int activation) {
    switch (activation) {
        case RELU:
            return z < 0.0f ? Vec{} : z;
        case SILU:
            return z / (1.0f + exponential(-z));
        case SIGMOID:
            return 1.0f / (1.0f + exponential(-z));
        default:
            return z;
    }
}

/// Products of one number with a vector of weights, in float32.
struct Singles {
    using Unit = float;
    using Operand = Vec;
    static constexpr int PER_UNIT = 1;

    static ALWAYS Operand broadcast(const Unit* p) { return all(*p); }
    static ALWAYS Operand load(const Unit* p) { return *reinterpret_cast<const LooseVec*>(p); }
    static ALWAYS Vec plus(Vec sum, Operand x, Operand w) { return sum + x * w; }
};

#if defined(__AVX512BF16__)
/// Products of two neighbouring channels in bfloat16, both added to a lane's float32.
struct Pairs {
    using Unit = uint32_t;
    using Operand = Words;
    static constexpr int PER_UNIT = 2;

    static ALWAYS Operand broadcast(const Unit* p) {
        uint32_t pair;
        std::memcpy(&pair, p, 4);
        return pair - Words{};
    }
    static ALWAYS Operand load(const Unit* p) { return *reinterpret_cast<const LooseWords*>(p); }
    static ALWAYS Vec plus(Vec sum, Operand x, Operand w) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
    }
};
#else
using Pairs = Singles;
#endif

}  // namespace

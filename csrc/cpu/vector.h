// Vectors of the processor that this is compiled for, by the compilers' own vector types: AVX-512, AVX2, NEON or SSE.
//
// Of instructions that these do not know there are four: the product of pairs in bfloat16, loads of some numbers again
// and again, of the first lanes alone, and of two halves.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
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
typedef uint64_t Longs __attribute__((vector_size(BYTES)));
typedef uint32_t HalfWords __attribute__((vector_size(BYTES / 2)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
typedef float LooseVec __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef uint32_t LooseHalfWords __attribute__((vector_size(BYTES / 2), aligned(4), may_alias));
typedef uint32_t Quad __attribute__((vector_size(16)));
typedef uint32_t LooseQuad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

/// A bfloat16 number as it lies in memory.
struct Bf16 {
    uint16_t bits;
};

ALWAYS Vec all(float value) { return value - Vec{}; }

ALWAYS Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }

ALWAYS void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

ALWAYS Vec load(const Bf16* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
    const Words wide = __builtin_convertvector(Halves(*reinterpret_cast<const LooseHalves*>(p)), Words) << 16;
    return (Vec)wide;
#endif
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

/// Two vectors, one behind the other.
ALWAYS void store(Bf16* p, Vec first, Vec second) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    store(p, first), store(p + LANES, second);
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

/// A vector of two halves.
template <typename T>
ALWAYS Vec load_halves(const T* a, const T* b) {
    T both[LANES];
    std::memcpy(both, a, sizeof(both) / 2);
    std::memcpy(both + LANES / 2, b, sizeof(both) / 2);
    return load(both);
}

template <typename T>
ALWAYS void store_halves(T* a, T* b, Vec v) {
    T both[LANES];
    store(both, v);
    std::memcpy(a, both, sizeof(both) / 2);
    std::memcpy(b, both + LANES / 2, sizeof(both) / 2);
}

#if defined(__AVX512F__)
template <>
ALWAYS Vec load_halves(const float* a, const float* b) {
    const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(a));
    return (Vec)_mm512_insertf64x4((__m512d)low, (__m256d)_mm256_loadu_ps(b), 1);
}

template <>
ALWAYS void store_halves(float* a, float* b, Vec v) {
    _mm256_storeu_ps(a, _mm512_castps512_ps256((__m512)v));
    _mm256_storeu_pd(reinterpret_cast<double*>(b), _mm512_extractf64x4_pd((__m512d)v, 1));
}

ALWAYS __mmask16 lanes_before(int count) { return __mmask16(count >= LANES ? 0xffff : (1 << count) - 1); }

template <>
ALWAYS Vec load(const float* p, int count) {
    return (Vec)_mm512_maskz_loadu_ps(lanes_before(count), p);
}

template <>
ALWAYS void store(float* p, Vec v, int count) {
    _mm512_mask_storeu_ps(p, lanes_before(count), (__m512)v);
}
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
template <>
ALWAYS Vec load(const Bf16* p, int count) {
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_before(count), p)), 16);
}

template <>
ALWAYS void store(Bf16* p, Vec v, int count) {
    _mm256_mask_storeu_epi16(p, lanes_before(count), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#endif

ALWAYS void put(float* p, float value) { *p = value; }

ALWAYS void put(Bf16* p, float value) { store(p, all(value), 1); }

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
template <typename Lanes>
ALWAYS Lanes picked(Lanes x, Lanes index) {
#if defined(__clang__)
    Lanes y;
    for (unsigned l = 0; l < sizeof(x) / 4; l++) y[l] = x[index[l]];
    return y;
#else
    return __builtin_shuffle(x, index);
#endif
}

/// The words of two vectors in turn.
template <typename Some>
ALWAYS void two_in_turn(Some a, Some b, uint32_t* to) {
    constexpr int COUNT = sizeof(Some) / 4;
#if defined(__clang__)
    for (int l = 0; l < COUNT; l++) to[2 * l] = a[l], to[2 * l + 1] = b[l];
#else
    Some first = {}, last = {};
    for (int l = 0; l < COUNT; l++) {
        first[l] = l % 2 * COUNT + l / 2;
        last[l] = first[l] + COUNT / 2;
    }
    first = __builtin_shuffle(a, b, first), last = __builtin_shuffle(a, b, last);
    std::memcpy(to, &first, sizeof(first));
    std::memcpy(to + COUNT, &last, sizeof(last));
#endif
}

/// The words of two rows in turn, a whole number of quads.
ALWAYS void two_in_turn(const uint32_t* a, const uint32_t* b, int64_t count, uint32_t* to) {
    for (; count >= LANES / 2 && LANES / 2 > 4; count -= LANES / 2, a += LANES / 2, b += LANES / 2, to += LANES)
        two_in_turn<HalfWords>(*reinterpret_cast<const LooseHalfWords*>(a), *reinterpret_cast<const LooseHalfWords*>(b), to);
    for (; count > 0; count -= 4, a += 4, b += 4, to += 8)
        two_in_turn<Quad>(*reinterpret_cast<const LooseQuad*>(a), *reinterpret_cast<const LooseQuad*>(b), to);
}

/// Lane l of the result is that of number l of `count` groups in turn, in lanes that hold one group after the other.
template <typename Lanes>
ALWAYS Lanes in_turn(int count) {
    const int lanes = sizeof(Lanes) / 4;
    Lanes index = {};
    for (int l = 0; l < lanes; l++) index[l] = l % count * (lanes / count) + l / count;
    return index;
}

/// Lanes that hold G groups in turn, one group after the other.
template <int G>
ALWAYS Vec one_by_one(Vec v) {
    return G == 1 || G == LANES ? v : (Vec)picked((Words)v, in_turn<Words>(LANES / G));
}

/// What `one_by_one` was made from.
template <int G>
ALWAYS Vec alternating(Vec v) {
    return G == 1 || G == LANES ? v : (Vec)picked((Words)v, in_turn<Words>(G));
}

/// G words again and again.
template <int G>
ALWAYS Words repeated(const void* p) {
    if constexpr (G == LANES) {
        return *static_cast<const LooseWords*>(p);
    } else if constexpr (G == 1) {
        uint32_t word;
        std::memcpy(&word, p, 4);
        return word - Words{};
    } else if constexpr (G == 2) {
        uint64_t words;
        std::memcpy(&words, p, 8);
        return (Words)(words - Longs{});
#if defined(__AVX512F__)
    } else if constexpr (G == 4) {
        return (Words)_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    } else if constexpr (G == 8) {
        return (Words)_mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    } else if constexpr (G == 4) {
        return (Words)_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#endif
    }
}

/// 1 / (1 + exp(-x)) as precise as what becomes a T needs: relative errors of 1e-7 + 5e-8 |x| for float32, and 0 below
/// -87; of 1.2e-4 for bfloat16, whose rounding is 2e-3.
template <typename T>
ALWAYS Vec logistic(Vec x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const __m512 power = (__m512)(x * -1.44269504f);
    const Vec r = (Vec)_mm512_reduce_ps(power, _MM_FROUND_TO_NEG_INF);  // its fraction; 2^r is a polynomial: Remez
    Vec p;
    if constexpr (sizeof(T) == 2) {
        p = ((all(0.0780245215f) * r + 0.226067156f) * r + 0.695833564f) * r + 0.999925196f;
        return (Vec)_mm512_rcp14_ps((__m512)((Vec)_mm512_scalef_ps((__m512)p, power) + 1.0f));
    }
    p = ((all(0.00187757669f) * r + 0.00898933969f) * r + 0.0558263175f) * r + 0.240153611f;
    p = (p * r + 0.693153083f) * r + 0.99999994f;
    const __m512 sum = (__m512)((Vec)_mm512_scalef_ps((__m512)p, power) + 1.0f), near = _mm512_rcp14_ps(sum);
    const __m512 off = _mm512_fnmadd_ps(sum, near, _mm512_set1_ps(1.0f));
    const __mmask16 finite = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLE_UQ);
    return (Vec)_mm512_maskz_fmadd_ps(finite, off, near, near);
#else
    return 1.0f / (1.0f + exponential(-x));
#endif
}

enum Activation { NONE, RELU, SILU, SIGMOID, RELU6, HARD_SWISH, HARD_SIGMOID, LEAKY_RELU };

/// z, where it is not below `least`: what is no number stays none, and -0 is not below 0.
ALWAYS Vec at_least(Vec least, Vec z) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)least, (__m512)z);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)least, (__m256)z);
#else
    return z < least ? least : z;
#endif
}

/// Whether no lane is true.
ALWAYS bool none(Ints lanes) {
#if defined(__AVX512F__)
    return !_mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
#else
    int32_t any = 0;
    for (int l = 0; l < LANES; l++) any |= lanes[l];
    return !any;
#endif
}

/// What is no number stays none.
ALWAYS Vec between(Vec z, float least, float most) {
    z = at_least(all(least), z);
    return z > most ? all(most) : z;
}

/// z / 6, rounded once: a product with the sixth alone would make all results of many layers larger by its own error.
ALWAYS Vec sixth(Vec z) {
    const Vec near = z * (1.0f / 6.0f);
    return near + (z - near * 6.0f) * (1.0f / 6.0f);
}

/// The activation of what becomes a T.
template <typename T>
ALWAYS Vec activate(Vec z, int activation) {
    switch (activation) {
        case RELU:
            return at_least(Vec{}, z);
        case SILU:
            return z * logistic<T>(z);
        case SIGMOID:
            return logistic<T>(z);
        case RELU6:
            return between(z, 0.0f, 6.0f);
        case HARD_SWISH:
            return z * sixth(between(z + 3.0f, 0.0f, 6.0f));
        case HARD_SIGMOID:
            return sixth(between(z + 3.0f, 0.0f, 6.0f));
        case LEAKY_RELU:
            return z < 0.0f ? z * 0.01f : z;
        default:
            return z;
    }
}

/// `use` of a constant that is the activation.
template <typename Use>
ALWAYS void with_activation(int activation, Use use) {
    switch (activation) {
        case RELU:
            return use(std::integral_constant<int, RELU>());
        case SILU:
            return use(std::integral_constant<int, SILU>());
        case SIGMOID:
            return use(std::integral_constant<int, SIGMOID>());
        case RELU6:
            return use(std::integral_constant<int, RELU6>());
        case HARD_SWISH:
            return use(std::integral_constant<int, HARD_SWISH>());
        case HARD_SIGMOID:
            return use(std::integral_constant<int, HARD_SIGMOID>());
        case LEAKY_RELU:
            return use(std::integral_constant<int, LEAKY_RELU>());
        default:
            return use(std::integral_constant<int, NONE>());
    }
}

/// Products of numbers with a vector of weights, in float32.
struct Singles {
    using Unit = float;
    using Operand = Vec;
    static constexpr int PER_UNIT = 1;

    template <int G>
    static ALWAYS Operand repeated(const Unit* p) {
        if constexpr (G == 1) return all(*p);
        return (Vec)::repeated<G>(p);
    }
    static ALWAYS Operand load(const Unit* p) { return *reinterpret_cast<const LooseVec*>(p); }
    static ALWAYS Vec plus(Vec sum, Operand x, Operand w) { return sum + x * w; }
};

#if defined(__AVX512BF16__)
/// Products of two neighbouring channels in bfloat16, both added to a lane's float32.
struct Pairs {
    using Unit = uint32_t;
    using Operand = Words;
    static constexpr int PER_UNIT = 2;

    template <int G>
    static ALWAYS Operand repeated(const Unit* p) {
        return ::repeated<G>(p);
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

// The innermost loops of a convolution: lanes are output channels, and several pixels of a row share each weight.
//
// y[p][k] = activation(bias[k] + residual[p][k] + sum over taps t and channels c of x[p + t][c] w[t][c][k])
//
// for M pixels p of an output row and the channels k of some vectors. The sums of a value have one order, whatever
// stands around it, so that no result depends on how the work is cut.

#pragma once

#include <utility>

#include "vector.h"

namespace {

/// What a kernel is called with. Offsets of x are in units of the arithmetic, of y in numbers.
struct Tile {
    const void* x;
    int64_t step;         // from a pixel's input to the next one's
    const int64_t* taps;  // where each tap reads, from a pixel's first one
    int tap_count;
    int units;      // that a tap sums
    int64_t other;  // from the group of a half vector's first lanes to that of its last ones
    const void* weight;
    const float* bias;
    const void* residual;  // laid out as y, or null
    void* y;
    int64_t pitch;  // from a pixel's output to the next one's
    float* sums;    // that the results are added to by channels, or null
    int channels;   // of the last vector, some may be missing
    int activation;
};

constexpr int MOST_PIXELS = 14;

/// How many pixels a kernel of so many vectors takes at most, for their sums to stay in registers.
constexpr int most_pixels(int vectors) {
    return REGISTERS == 32 ? (vectors <= 2 ? 14 : vectors == 3 ? 8 : vectors == 4 ? 7 : vectors == 5 ? 5 : 3)
                           : (vectors == 1 ? 10 : vectors == 2 ? 6 : vectors == 3 ? 4 : 2);
}

constexpr int MOST_VECTORS = REGISTERS == 32 ? 4 : 3;

/// What follows the sums of a tile, `sums[pixel][vector]`.
template <typename T, int ACTIVATION>
ALWAYS void finished(const Vec* sums, int pixels, int vectors, const Tile& tile) {
    const T* residual = static_cast<const T*>(tile.residual);
    T* y = static_cast<T*>(tile.y);
    for (int j = 0; j * LANES < tile.channels; j++) {
        const int count = tile.channels - j * LANES;
        Vec total = {};
        for (int i = 0; i < pixels; i++) {
            Vec z = sums[i * vectors + j];
            const int64_t at = i * tile.pitch + j * LANES;
            if (residual) z += load(residual + at, count);
            z = activate(z, ACTIVATION);
            total += z;
            store(y + at, z, count);
        }
        if (tile.sums) store(tile.sums + j * LANES, load(tile.sums + j * LANES, count) + total, count);
    }
}

template <typename T>
__attribute__((noinline)) void finish(const Vec* sums, int pixels, int vectors, const Tile& tile) {
    switch (tile.activation) {
        case RELU:
            return finished<T, RELU>(sums, pixels, vectors, tile);
        case SILU:
            return finished<T, SILU>(sums, pixels, vectors, tile);
        case SIGMOID:
            return finished<T, SIGMOID>(sums, pixels, vectors, tile);
        default:
            return finished<T, NONE>(sums, pixels, vectors, tile);
    }
}

/// The same without what is seldom asked for, from registers.
template <typename T, int M, int N>
ALWAYS void end(const Vec (&sums)[M][N], const Tile& tile) {
    if (tile.activation > RELU || tile.channels != N * LANES) return finish<T>(sums[0], M, N, tile);
    const T* residual = static_cast<const T*>(tile.residual);
    T* y = static_cast<T*>(tile.y);
    const Vec least = all(tile.activation == RELU ? 0.0f : -std::numeric_limits<float>::infinity());
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) {
        Vec total = {};
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            Vec z = sums[i][j];
            if (residual) z += load(residual + i * tile.pitch + j * LANES);
            z = z < least ? least : z;
            total += z;
            store(y + i * tile.pitch + j * LANES, z);
        }
        if (tile.sums) store(tile.sums + j * LANES, load(tile.sums + j * LANES) + total);
    }
}

/// Pixel i of those that begin at `a`, `b` five further and `c` ten further: of what an address can be made of without
/// a register for each.
template <typename Unit>
ALWAYS const Unit* pixel(int i, const char* a, const char* b, const char* c, int64_t step, int64_t thrice) {
    const char* base = i < 5 ? a : i < 10 ? b : c;
    const int k = i % 5;
    return reinterpret_cast<const Unit*>(k == 0   ? base
                                         : k == 1 ? base + step
                                         : k == 2 ? base + 2 * step
                                         : k == 3 ? base + thrice
                                                  : base + 4 * step);
}

constexpr int FEW_TERMS = 256;  // that are added to each other before they are added to the sum of all: the error of a
                                // sum grows with the number of terms, as that of a sum of sums does not

/// Put some sums aside and begin others, behind what was put aside before.
template <int M, int N>
ALWAYS void put_aside(Vec (&total)[M][N], Vec (&sums)[M][N], bool first) {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) {
            total[i][j] = first ? sums[i][j] : total[i][j] + sums[i][j];
            sums[i][j] = Vec{};
        }
}

template <int M, int N>
ALWAYS void take_back(const Vec (&total)[M][N], Vec (&sums)[M][N]) {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) sums[i][j] += total[i][j];
}

/// Sums of M pixels and NA vectors of one group of channels, with HALF one that ends with the next group's first
/// channels, and NB of the next group.
template <typename A, typename T, int M, int NA, bool HALF, int NB>
__attribute__((noinline)) void sums_by_broadcast(const Tile& tile) {
    using Unit = typename A::Unit;
    using Operand = typename A::Operand;
    constexpr int N = NA + HALF + NB;
    Vec total[M][N] = {}, sums[M][N];
    for (int j = 0; j < N; j++) {
        const Vec bias = load(tile.bias + j * LANES);
        for (int i = 0; i < M; i++) sums[i][j] = bias;
    }
    int summed = 0;
    bool aside = false;
    const Unit* w = static_cast<const Unit*>(tile.weight);
    const int64_t step = tile.step * sizeof(Unit), thrice = 3 * step, other = tile.other;
    Ints last = {};
    for (int l = 0; l < LANES; l++) last[l] = l >= LANES / 2 ? -1 : 0;
    for (int t = 0; t < tile.tap_count; t++) {
        const char* a = reinterpret_cast<const char*>(static_cast<const Unit*>(tile.x) + tile.taps[t]);
        const char *b = a + 5 * step, *c = a + 10 * step;
        for (int left = tile.units; left > 0;) {
            const int some = left < FEW_TERMS ? left : FEW_TERMS;
            if (summed + some > FEW_TERMS) {
                put_aside(total, sums, !aside);
                summed = 0, aside = true;
            }
            summed += some, left -= some;
            for (int u = 0; u < some; u++) {
                Operand weight[N];
                for (int j = 0; j < N; j++) weight[j] = A::load(w + j * LANES);
                w += N * LANES;
                asm("" : "+r"(a), "+r"(b), "+r"(c));
#pragma GCC unroll 16
                for (int i = 0; i < M; i++) {
                    const Unit* p = pixel<Unit>(i, a, b, c, step, thrice);
                    const Operand x = A::broadcast(p);
                    for (int j = 0; j < NA; j++) sums[i][j] = A::plus(sums[i][j], x, weight[j]);
                    if (HALF) {
                        const Operand y = A::broadcast(p + other);
                        sums[i][NA] = A::plus(sums[i][NA], last ? y : x, weight[NA]);
                        for (int j = NA + 1; j < N; j++) sums[i][j] = A::plus(sums[i][j], y, weight[j]);
                    }
                }
                a += sizeof(Unit), b += sizeof(Unit), c += sizeof(Unit);
            }
        }
    }
    if (aside) take_back(total, sums);
    end<T>(sums, tile);
}

/// Sums of M pixels and one vector of several whole groups, each of WIDTH channels: of the vector of a pixel's channels
/// each lane takes that of its own group.
template <typename A, typename T, int M, int WIDTH>
__attribute__((noinline)) void sums_by_lanes(const Tile& tile) {
    using Unit = typename A::Unit;
    using Operand = typename A::Operand;
    constexpr int UNITS = WIDTH > A::PER_UNIT ? WIDTH / A::PER_UNIT : 1;
    Vec sums[M][1];
    for (int i = 0; i < M; i++) sums[i][0] = load(tile.bias);
    Words first = {};
    for (int l = 0; l < LANES; l++) first[l] = l / WIDTH * WIDTH / A::PER_UNIT;
    const Unit* w = static_cast<const Unit*>(tile.weight);
    const int64_t step = tile.step * sizeof(Unit), thrice = 3 * step;
    for (int t = 0; t < tile.tap_count; t++) {
        const char* a = reinterpret_cast<const char*>(static_cast<const Unit*>(tile.x) + tile.taps[t]);
        const char *b = a + 5 * step, *c = a + 10 * step;
        asm("" : "+r"(a), "+r"(b), "+r"(c));
        Operand weight[UNITS];
        for (int u = 0; u < UNITS; u++) weight[u] = A::load(w + u * LANES);
        w += UNITS * LANES;
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const Operand x = A::load(pixel<Unit>(i, a, b, c, step, thrice));
#pragma GCC unroll 16
            for (int u = 0; u < UNITS; u++) {
                const Operand own = A::PER_UNIT * UNITS == 1 ? x : (Operand)picked((Words)x, first + u);
                sums[i][0] = A::plus(sums[i][0], own, weight[u]);
            }
        }
    }
    end<T>(sums, tile);
}

using Kernel = void (*)(const Tile&);

/// A kernel for each number of pixels.
struct Kernels {
    Kernel by_pixels[MOST_PIXELS + 1] = {};
    int most = 0;
};

template <typename A, typename T, int NA, bool HALF, int NB, int... I>
constexpr Kernels broadcast_kernels(std::integer_sequence<int, I...>) {
    return {{nullptr, sums_by_broadcast<A, T, I + 1, NA, HALF, NB>...}, sizeof...(I)};
}

template <typename A, typename T, int WIDTH, int... I>
constexpr Kernels lane_kernels(std::integer_sequence<int, I...>) {
    return {{nullptr, sums_by_lanes<A, T, I + 1, WIDTH>...}, sizeof...(I)};
}

template <typename A, typename T, int NA, bool HALF = false, int NB = 0>
constexpr Kernels by_broadcast() {
    return broadcast_kernels<A, T, NA, HALF, NB>(std::make_integer_sequence<int, most_pixels(NA + HALF + NB)>());
}

template <typename A, typename T, int WIDTH>
constexpr Kernels by_lanes() {
    return lane_kernels<A, T, WIDTH>(std::make_integer_sequence<int, 7>());
}

/// The kernels of vectors that each have one group.
template <typename A, typename T>
const Kernels& whole_kernels(int vectors) {
    static constexpr Kernels found[] = {by_broadcast<A, T, 1>(), by_broadcast<A, T, 2>(), by_broadcast<A, T, 3>(),
                                        by_broadcast<A, T, 4>()};
    return found[vectors - 1];
}

/// The kernels of a vector of two groups, with so many whole ones on each side.
template <typename A, typename T>
const Kernels& half_kernels(int beside) {
    static constexpr Kernels found[] = {by_broadcast<A, T, 1, true, 1>(), by_broadcast<A, T, 2, true, 2>(),
                                        by_broadcast<A, T, 3, true, 3>()};
    return found[beside - 1];
}

/// The kernels of groups of which a vector has several: 1, 2, 4 or 8 channels wide.
template <typename A, typename T>
const Kernels& lane_kernels(int width) {
    static constexpr Kernels found[] = {by_lanes<A, T, 1>(), by_lanes<A, T, 2>(), by_lanes<A, T, 4>(),
                                        by_lanes<A, T, 8>()};
    return found[width == 8 ? 3 : width / 2];
}

}  // namespace

// The innermost loops of a convolution: lanes are output channels, and several pixels of a row share each weight.
//
// y[p][k] = activation(bias[k] + residual[p][k] + sum over taps t and channels c of x[p + t][c] w[t][c][k])
//
// for M pixels p of an output row and the channels k of some vectors. The sums of a value have one order, whatever
// stands around it, so that no result depends on how the work is cut.
//
// Groups that do not fill vectors are computed together: lanes hold G groups in turn, and so does x, so that one load of
// G numbers again and again gives every lane the input of its own group.

#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace {

/// What a kernel is called with. Offsets of x are in units of the arithmetic, of y in numbers.
struct Tile {
    const void* x;
    int64_t step;         // from a pixel's input to the next one's
    const int64_t* taps;  // where each tap reads, from a pixel's first one
    const char* edges;    // for each tap, which pixel reads nothing but the border there: an `Edge`; or null
    int tap_count;
    int units;  // of each group that a tap sums
    int few;    // terms that are added to each other before they are added to the sum of all
    const void* weight;
    const void* next;  // weights that are asked for meanwhile, and
    int64_t pace;      // how many of their units for each one that is summed
    const float* bias;
    const void* residual;  // laid out as y, or null
    void* y;
    int64_t pitch;  // from a pixel's output to the next one's
    float* sums;    // that the results are added to by channels, or null
    int channels;   // of each group; of the last vector, some may be missing
    int groups;     // that are there
    int64_t apart;  // from a group's output to the next one's
    int activation;
    bool raw;  // the sums as they stand, lane by lane, without what follows them
};

enum Edge : char { WITHIN, FIRST, LAST };

constexpr int MOST_PIXELS = 14;

// The error of a sum grows with the number of its terms, as that of a sum of sums does not. What computes vectors (gates,
// classifiers) waits for its weights, and has the time for shorter ones.
constexpr int FEW_TERMS = 256, FEW_OF_VECTORS = 32;

/// How many pixels a kernel of so many vectors takes at most, for their sums to stay in registers.
constexpr int most_pixels(int vectors) {
    return REGISTERS == 32 ? (vectors <= 2 ? 14 : vectors == 3 ? 8 : 7)
                           : (vectors == 1 ? 10 : vectors == 2 ? 6 : vectors == 3 ? 4 : 2);
}

constexpr int MOST_VECTORS = REGISTERS == 32 ? 4 : 3;

/// What follows the sums of a tile: of each pixel `together` rows of sums of which the first `groups` are there, each of
/// so many channels, `apart` in y.
struct Sums {
    const float* sums;
    int pixels, together, row, groups, channels;
    int64_t apart;
};

template <typename T, int ACTIVATION>
ALWAYS void finished(const Sums& of, const Tile& tile) {
    const T* residual = static_cast<const T*>(tile.residual);
    T* y = static_cast<T*>(tile.y);
    for (int g = 0; g < of.groups; g++) {
        for (int c = 0; c < of.channels; c += LANES) {
            const int count = of.channels - c;
            const int64_t own = g * of.apart + c;
            Vec total = {};
            for (int i = 0; i < of.pixels; i++) {
                Vec z = load(of.sums + (i * of.together + g) * of.row + c, count);
                if (residual) z += load(residual + i * tile.pitch + own, count);
                z = activate<T>(z, ACTIVATION);
                total += z;
                store(y + i * tile.pitch + own, z, count);
            }
            if (tile.sums) store(tile.sums + own, load(tile.sums + own, count) + total, count);
        }
    }
}

template <typename T>
__attribute__((noinline)) void finish(const Sums& of, const Tile& tile) {
    with_activation(tile.activation, [&](auto known) { finished<T, decltype(known)::value>(of, tile); });
}

/// A vector of G groups, one group after the other, where they lie `apart`.
template <int G, typename T>
ALWAYS Vec gathered(const T* p, int64_t apart) {
    return G != 2 || apart == LANES / 2 ? load(p) : load_halves(p, p + apart);
}

template <int G, typename T>
ALWAYS void scatter(T* p, int64_t apart, Vec v) {
    G != 2 || apart == LANES / 2 ? store(p, v) : store_halves(p, p + apart, v);
}

/// The same for one vector of each pixel, from registers and without what is seldom asked for.
template <typename T, int M, int N, int G, bool WHOLE>
ALWAYS void end_vector(const Vec (&sums)[M][N], int j, Vec least, const Tile& tile) {
    constexpr int EACH = LANES / G;
    const int count = tile.channels - j * LANES;
    const T* residual = static_cast<const T*>(tile.residual) + j * EACH;
    T* y = static_cast<T*>(tile.y) + j * EACH;
    Vec total = {};
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
        Vec z = one_by_one<G>(sums[i][j]);
        const int64_t at = i * tile.pitch;
        if (tile.residual) z += WHOLE ? gathered<G>(residual + at, tile.apart) : load(residual + at, count);
        z = at_least(least, z);
        total += z;
        if (WHOLE) scatter<G>(y + at, tile.apart, z);
        else store(y + at, z, count);
    }
    if (!tile.sums) return;
    float* place = tile.sums + j * EACH;
    if (WHOLE) scatter<G>(place, tile.apart, gathered<G>(place, tile.apart) + total);
    else store(place, load(place, count) + total, count);
}

template <typename T, int M, int N, int G>
ALWAYS void end(const Vec (&sums)[M][N], const Tile& tile) {
    constexpr int EACH = LANES / G;
    if (std::is_same<T, float>::value && G <= 2 && tile.raw) {
        float* y = static_cast<float*>(tile.y);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++)
#pragma GCC unroll 16
            for (int j = 0; j < N; j++) store(y + i * tile.pitch + j * LANES, sums[i][j]);
        return;
    }
    if (G > 1 && N == 1 && tile.apart == EACH && (tile.activation > RELU || tile.groups != G)) {  // without gaps
        float lanes[M][LANES];
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) store(lanes[i], one_by_one<G>(sums[i][0]));
        return finish<T>({lanes[0], M, 1, LANES, 1, tile.groups * EACH, 0}, tile);
    }
    if (tile.activation > RELU || tile.groups != G) {
        float lanes[M][G][N * EACH];
#pragma GCC unroll 16
        for (int i = 0; i < M; i++)
#pragma GCC unroll 16
            for (int j = 0; j < N; j++) {
                float both[LANES];
                store(both, one_by_one<G>(sums[i][j]));
                for (int g = 0; g < G; g++) std::memcpy(lanes[i][g] + j * EACH, both + g * EACH, EACH * sizeof(float));
            }
        return finish<T>({lanes[0][0], M, G, N * EACH, tile.groups, tile.channels, tile.apart}, tile);
    }
    const Vec least = all(tile.activation == RELU ? 0.0f : -std::numeric_limits<float>::infinity());
#pragma GCC unroll 16
    for (int j = 0; j < N - 1; j++) end_vector<T, M, N, G, true>(sums, j, least, tile);
    if (G > 1 || tile.channels == N * LANES) end_vector<T, M, N, G, true>(sums, N - 1, least, tile);
    else end_vector<T, M, N, G, false>(sums, N - 1, least, tile);
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

constexpr int AHEAD = 512;  // units by which weights are brought near before they are read

/// Where sums are put aside. The compiler does not see that it is always the same place, or it would spend registers on
/// what is seldom used.
ALWAYS float* unknown(float* place) {
    asm("" : "+r"(place));
    return place;
}

/// Put some sums aside and begin others, behind what was put aside before.
template <int M, int N>
ALWAYS void put_aside(float* total, Vec (&sums)[M][N], bool first) {
    float* place = unknown(total);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
        for (int j = 0; j < N; j++, place += LANES) {
            store(place, first ? sums[i][j] : load(place) + sums[i][j]);
            sums[i][j] = Vec{};
        }
}

template <int M, int N>
ALWAYS void take_back(float* total, Vec (&sums)[M][N]) {
    const float* place = unknown(total);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
        for (int j = 0; j < N; j++, place += LANES) sums[i][j] += load(place);
}

/// Have what is read and written behind the sums of a pixel brought near meanwhile.
template <typename T, int N, int G>
ALWAYS void announce(const Tile& tile, int i) {
    constexpr int LINE = 64 / sizeof(T);
    const int64_t at = i * tile.pitch;
    for (int c = 0; c < N * LANES / G; c += LINE) __builtin_prefetch(static_cast<const T*>(tile.y) + at + c, 1);
    if (!tile.residual || tile.residual == tile.y) return;
    for (int c = 0; c < N * LANES / G; c += LINE) __builtin_prefetch(static_cast<const T*>(tile.residual) + at + c);
}

/// Add the products of so many units to the sums of the pixels from BEGIN to END.
template <typename A, int M, int N, int G, int BEGIN, int END>
ALWAYS void add_products(Vec (&sums)[M][N], const char* x, const typename A::Unit* w, const typename A::Unit* next,
                         int64_t pace, int count, int64_t step) {
    using Unit = typename A::Unit;
    using Operand = typename A::Operand;
    const int64_t thrice = 3 * step;
    const char *a = x, *b = a + 5 * step, *c = a + 10 * step;
    for (int u = 0; u < count; u++) {
        Operand weight[N];
        for (int j = 0; j < N; j++) {
            weight[j] = A::load(w + j * LANES);
            __builtin_prefetch(w + j * LANES + AHEAD);
        }
        __builtin_prefetch(next, 0, 2);
        w += N * LANES, next += pace;
        asm("" : "+r"(a), "+r"(b), "+r"(c));
#pragma GCC unroll 16
        for (int i = BEGIN; i < END; i++) {
            const Operand own = A::template repeated<G>(pixel<Unit>(i, a, b, c, step, thrice));
            for (int j = 0; j < N; j++) sums[i][j] = A::plus(sums[i][j], own, weight[j]);
        }
        a += G * sizeof(Unit), b += G * sizeof(Unit), c += G * sizeof(Unit);
    }
}

/// Sums of M pixels and N vectors, each of G groups.
template <typename A, typename T, int M, int N, int G>
__attribute__((noinline)) void summed(const Tile& tile) {
    using Unit = typename A::Unit;
    float total[M * N * LANES];
    Vec sums[M][N];
    const int64_t apart = tile.groups == G ? tile.apart : 0;
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) {
        const Vec bias = tile.raw ? Vec{} : alternating<G>(gathered<G>(tile.bias + j * (LANES / G), apart));
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) sums[i][j] = bias;
    }
    int terms = 0, announced = tile.raw ? M : 0;
    const int pace = tile.residual ? tile.units * tile.tap_count / M : 0;
    bool aside = false;
    const Unit *w = static_cast<const Unit*>(tile.weight), *next = static_cast<const Unit*>(tile.next);
    const int64_t step = tile.step * sizeof(Unit);
    for (int t = 0; t < tile.tap_count; t++) {
        const char* x = reinterpret_cast<const char*>(static_cast<const Unit*>(tile.x) + tile.taps[t]);
        const char edge = N < 3 || G > 2 || !tile.edges ? char(WITHIN) : tile.edges[t];
        for (int left = tile.units; left > 0;) {
            int some = left < tile.few ? left : tile.few;
            if (terms + some > tile.few) {
                put_aside(total, sums, !aside);
                terms = 0, aside = true;
            }
            terms += some, left -= some;
            for (int now = some; some > 0; some -= now) {
                now = some;
                if (announced < M) {
                    const int until = pace < 8 ? M : announced + 1;
                    while (announced < until) announce<T, N, G>(tile, announced++);
                    if (pace >= 8 && now > pace) now = pace;
                }
                if (N >= 3 && G <= 2 && edge == FIRST)
                    add_products<A, M, N, G, 1, M>(sums, x, w, next, tile.pace, now, step);
                else if (N >= 3 && G <= 2 && edge == LAST)
                    add_products<A, M, N, G, 0, M - 1>(sums, x, w, next, tile.pace, now, step);
                else
                    add_products<A, M, N, G, 0, M>(sums, x, w, next, tile.pace, now, step);
                w += now * N * LANES, next += now * tile.pace, x += now * G * sizeof(Unit);
            }
        }
    }
    if (aside) take_back(total, sums);
    end<T, M, N, G>(sums, tile);
}

/// Have the call of a number, of so many with these weights, ask for its share of those that lie behind them, a line for
/// each unit at most.
template <typename Unit>
void ask(Tile& tile, const Unit* weight, int64_t of_a_vector, int64_t vectors, int64_t number, int64_t calls) {
    tile.pace = std::min<int64_t>(LANES, (vectors * LANES + calls - 1) / calls);
    tile.next = weight + vectors * of_a_vector + number * tile.pace * (of_a_vector / LANES);
}

using Kernel = void (*)(const Tile&);

/// A kernel for each number of pixels.
struct Kernels {
    Kernel by_pixels[MOST_PIXELS + 1] = {};
    int most = 0;
};

template <typename A, typename T, int N, int G, int... I>
constexpr Kernels listed(std::integer_sequence<int, I...>) {
    return {{nullptr, summed<A, T, I + 1, N, G>...}, sizeof...(I)};
}

template <typename A, typename T, int N, int G = 1>
constexpr Kernels kernels() {
    if constexpr (G > LANES || N > MOST_VECTORS) return {};
    else return listed<A, T, N, G>(std::make_integer_sequence<int, (G > 2 ? 7 : most_pixels(N))>());
}

/// The kernels of so many vectors and groups: more than two groups have one vector.
template <typename A, typename T>
const Kernels& compiled(int vectors, int groups) {
    static constexpr Kernels found[] = {
        kernels<A, T, 1>(),    kernels<A, T, 2>(),    kernels<A, T, 3>(),    kernels<A, T, 4>(),
        kernels<A, T, 1, 2>(), kernels<A, T, 2, 2>(), kernels<A, T, 3, 2>(), kernels<A, T, 4, 2>(),
        kernels<A, T, 1, 4>(), kernels<A, T, 1, 8>(), kernels<A, T, 1, 16>()};
    return found[groups <= 2 ? (groups - 1) * 4 + vectors - 1 : groups == 4 ? 8 : groups == 8 ? 9 : 10];
}

}  // namespace

/// `compiled` of float32 and of bfloat16, each in a file of its own, which the compiler is given at the same time.
extern "C" const void* float32_kernels(int vectors, int groups);
extern "C" const void* bfloat16_kernels(int vectors, int groups);

namespace {

template <typename A, typename T>
const Kernels& kernels_of(int vectors, int groups) {
    const auto found = std::is_same<T, float>::value ? float32_kernels : bfloat16_kernels;
    return *static_cast<const Kernels*>(found(vectors, groups));
}

}  // namespace

// A depthwise convolution: lanes are channels, each with weights of its own.
//
// y[p][c] = activation(bias[c] + residual[p][c] + sum over taps t of x[p + t][c] w[t][c])
//
// Some pixels of a row are computed together: each number that is read serves all of them whose taps it lies under. They
// find their columns by pointers, to zeros beyond the border, so that x is read where it lies. Sums are float32, weights
// are float32 for maps of bfloat16 as well. Where channels do not fill vectors, the last vector begins within the one
// before it, and both find the same values.

#pragma once

#include "plan.h"

namespace {

constexpr int MOST_ACROSS = 8;   // pixels of a call
constexpr int MOST_WIDE = 16;    // vectors of a call
constexpr int MOST_TAPS = 5;     // of a kernel's row, and of its column
constexpr int MOST_STRIDE = 2;

struct Depthwise {
    Step step;
    int64_t taps, vectors;
    int64_t wide, blocks;  // vectors of a call
    int64_t band, bands;   // rows of a chunk

    explicit Depthwise(const Step& given) : step(given) {
        taps = step.kernel[0] * step.kernel[1];
        vectors = divided(step.channels, LANES);
        wide = divided(vectors, divided(vectors, MOST_WIDE)), blocks = divided(vectors, wide);
        const double row = double(step.out_width * taps * LANES) * wide;
        band = std::max<int64_t>(1, int64_t(chunk_of(row * blocks * step.out_height) / row));
        bands = divided(step.out_height, std::min(band, step.out_height)), band = divided(step.out_height, bands);
        bands = divided(step.out_height, band);
    }

    int64_t size() const { return vectors * taps * LANES; }

    int64_t chunks() const { return step.images * bands * blocks; }

    Chunk chunk(int64_t number) const {
        return {number / (bands * blocks), number / blocks % bands, number % blocks};
    }
};

/// The first channel of a vector of some channels.
ALWAYS int64_t first_of(int64_t vector, int64_t channels) { return std::min(vector * LANES, channels - LANES); }

/// The sums of P pixels, of K taps in each of some rows, S apart. `columns` holds where the columns of each row begin.
template <typename T, int P, int K, int S>
__attribute__((noinline)) void depthwise_sums(const T* const* columns, int rows, int64_t taps, const float* weight,
                                              const float* bias, int64_t channels, float* sums) {
    constexpr int COLUMNS = (P - 1) * S + K;
    for (int64_t v = 0; v * LANES < channels; v++, weight += taps * LANES) {
        const int64_t c = first_of(v, channels);
        Vec sum[P];
#pragma GCC unroll 16
        for (int i = 0; i < P; i++) sum[i] = load(bias + c);
        for (int r = 0; r < rows; r++) {
            const T* const* from = columns + r * COLUMNS;
            Vec own[K];
#pragma GCC unroll 16
            for (int t = 0; t < K; t++) own[t] = load(weight + (r * K + t) * LANES);
#pragma GCC unroll 32
            for (int j = 0; j < COLUMNS; j++) {
                const Vec x = load(from[j] + c);
#pragma GCC unroll 16
                for (int t = 0; t < K; t++)
                    if (j >= t && (j - t) % S == 0 && (j - t) / S < P) sum[(j - t) / S] += x * own[t];
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < P; i++) store(sums + i * MOST_WIDE * LANES + c, sum[i]);
    }
}

template <typename T>
using DepthwiseKernel = void (*)(const T* const*, int, int64_t, const float*, const float*, int64_t, float*);

template <typename T, int K, int S, int... I>
DepthwiseKernel<T> depthwise_kernel(int64_t pixels, std::integer_sequence<int, I...>) {
    static constexpr DepthwiseKernel<T> found[] = {depthwise_sums<T, I + 1, K, S>...};
    return found[pixels - 1];
}

template <typename T>
DepthwiseKernel<T> depthwise_kernel(const Step& s, int64_t pixels) {
    constexpr std::make_integer_sequence<int, MOST_ACROSS> all;
    if (s.kernel[1] == 3)
        return s.stride[1] == 1 ? depthwise_kernel<T, 3, 1>(pixels, all) : depthwise_kernel<T, 3, 2>(pixels, all);
    return s.stride[1] == 1 ? depthwise_kernel<T, 5, 1>(pixels, all) : depthwise_kernel<T, 5, 2>(pixels, all);
}

template <typename T>
void depthwise_chunk(const Depthwise& d, void* const* buffers, int64_t number) {
    static const float zeros[MOST_WIDE * LANES] = {};
    const Step& s = d.step;
    const Chunk chunk = d.chunk(number);
    const int64_t first = chunk.block * d.wide * LANES, channels = std::min(d.wide * LANES, s.channels - first);
    const T* x = static_cast<const T*>(buffers[s.x]) + chunk.image * s.height * s.width * s.channels + first;
    const float* weight = static_cast<const float*>(s.weight) + chunk.block * d.wide * d.taps * LANES;
    const T* columns[MOST_TAPS * ((MOST_ACROSS - 1) * MOST_STRIDE + MOST_TAPS)];
    float sums[MOST_ACROSS * MOST_WIDE * LANES];
    Tile tile = {};
    tile.pitch = s.channels, tile.activation = int(s.activation);
    if (s.sums >= 0) {
        tile.sums = static_cast<float*>(buffers[s.sums]) + (chunk.image * d.bands + chunk.band) * s.channels + first;
        std::fill_n(tile.sums, channels, 0.0f);
    }
    const int64_t end = std::min((chunk.band + 1) * d.band, s.out_height), pieces = divided(s.out_width, MOST_ACROSS);
    for (int64_t row = chunk.band * d.band; row < end; row++) {
        const Rows reached = reached_rows(s, row);
        for (int64_t piece = 0, done = 0; piece < pieces; piece++) {
            const int64_t size = s.out_width / pieces + (piece < s.out_width % pieces);
            const int64_t across = (size - 1) * s.stride[1] + s.kernel[1], left = done * s.stride[1] - s.padding[1];
            for (int64_t r = 0; r < reached.count; r++) {
                const int64_t down = row * s.stride[0] - s.padding[0] + (reached.first + r) * s.dilation[0];
                const T* from = x + (down * s.width + left) * s.channels;
                for (int64_t j = 0; j < across; j++, from += s.channels)
                    columns[r * across + j] =
                        left + j >= 0 && left + j < s.width ? from : reinterpret_cast<const T*>(zeros);
            }
            depthwise_kernel<T>(s, size)(columns, int(reached.count), d.taps,
                                         weight + reached.first * s.kernel[1] * LANES, s.bias + first, channels, sums);
            const int64_t at = ((chunk.image * s.out_height + row) * s.out_width + done) * s.channels + first;
            tile.y = static_cast<T*>(buffers[s.y]) + at;
            tile.residual = s.residual < 0 ? nullptr : static_cast<const T*>(buffers[s.residual]) + at;
            finish<T>({sums, int(size), 1, MOST_WIDE * LANES, 1, int(channels), 0}, tile);
            done += size;
        }
    }
}

inline void pack_depthwise(const Depthwise& d, const float* weight, float* packed) {
    for (int64_t v = 0; v < d.vectors; v++)
        for (int64_t t = 0; t < d.taps; t++)
            for (int64_t l = 0; l < LANES; l++, packed++)
                *packed = weight[(first_of(v, d.step.channels) + l) * d.taps + t];
}

}  // namespace

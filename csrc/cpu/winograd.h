// A 3x3 convolution in float32 by Winograd's F(2x2, 3x3): of four values, 16 products in the place of 36.
//
// y = A^T [(G w G^T) * (B^T x B)] A for each tile of 2x2 values, from 4x4 of the input, where * is over values and summed
// over channels:
//
//     B^T = 1  0 -1  0    G = 1    0    0     A^T = 1  1  1  0
//           0  1  1  0        1/2  1/2  1/2         0  1 -1 -1
//           0 -1  1  0        1/2 -1/2  1/2
//           0  1  0 -1        0    0    1
//
// The products of each of the 16 places are those of a 1x1 convolution over tiles, by its kernels; groups that do not fill
// vectors take turns as they do there. Source: A. Lavin and
// S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015.

#pragma once

#include "convolution.h"

namespace {

constexpr int PLACES = 16;
constexpr int64_t TILES = 32;  // in a chunk, at most: a weight that is read serves so many

struct Winograd {
    Step step;
    std::vector<Channels> tiles;
    int64_t per_group;
    int64_t rows, across;    // of tiles of values
    int64_t band, bands;     // rows of them
    int64_t place, product;  // numbers between two places, of tiles and of products
    int64_t panel;           // bytes

    explicit Winograd(const Step& given) : step(given), tiles(Conv(given).tiles) {
        per_group = step.channels / step.groups;
        rows = divided(step.out_height, 2), across = divided(step.out_width, 2);
        const int64_t most = std::max<int64_t>(1, TILES / across);
        bands = divided(rows, most), band = divided(rows, bands), bands = divided(rows, band);
        int64_t weight = 0, widest = 0, together = 1;
        for (Channels& tile : tiles) {
            const int64_t size = per_group * tile.vectors * LANES;
            tile.slice = int(tile.first / (step.out_channels / step.groups) * per_group);
            tile.weight = weight;
            weight += PLACES * size;
            widest = std::max<int64_t>(widest, tile.vectors * LANES);
            together = std::max<int64_t>(together, tile.together);
        }
        place = band * across * per_group * together + LANES;  // not a multiple of a page
        product = band * across * widest + LANES;
        panel = PLACES * (place + product) * 4;
    }

    int64_t size() const { return tiles.back().weight + PLACES * per_group * tiles.back().vectors * LANES; }

    int64_t chunks() const { return step.images * bands * int64_t(tiles.size()); }

    /// Of one group the tiles of a band share what was made of the input, of several the bands share weights.
    Chunk chunk(int64_t number) const {
        const int64_t count = int64_t(tiles.size()), image = number / (bands * count), own = number % (bands * count);
        return step.groups > 1 ? Chunk{image, own % bands, own / bands} : Chunk{image, own / count, own % count};
    }
};

/// B^T x B of some rows of tiles, of G groups in turn.
template <int G>
__attribute__((noinline)) void transform(const Winograd& w, const float* x, int64_t first, int64_t rows, float* out) {
    const Step& s = w.step;
    for (int64_t tile = 0; tile < rows * w.across; tile++) {
        const int64_t top = 2 * (first + tile / w.across) - s.padding[0], left = 2 * (tile % w.across) - s.padding[1];
        const bool inside = top >= 0 && left >= 0 && top + 4 <= s.height && left + 4 <= s.width;
        float* to = out + tile * w.per_group * G;
        for (int64_t c = 0; c < w.per_group; c += LANES / G, to += LANES) {
            const int count = int(w.per_group - c);
            Vec d[4][4];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    const int64_t row = top + i, column = left + j;
                    const bool there = inside || (row >= 0 && row < s.height && column >= 0 && column < s.width);
                    const float* from = x + (row * s.width + column) * s.channels + c;
                    if (!there) d[i][j] = Vec{};
                    else d[i][j] = G == 1 ? load(from, count) : alternating<G>(gathered<G>(from, w.per_group));
                }
            for (int j = 0; j < 4; j++) {
                const Vec a = d[0][j] - d[2][j], b = d[1][j] + d[2][j], e = d[2][j] - d[1][j], f = d[1][j] - d[3][j];
                d[0][j] = a, d[1][j] = b, d[2][j] = e, d[3][j] = f;
            }
            for (int i = 0; i < 4; i++) {  // what is beyond the channels is written over by the next tile
                float* row = to + 4 * i * w.place;
                store(row, d[i][0] - d[i][2]);
                store(row + w.place, d[i][1] + d[i][2]);
                store(row + 2 * w.place, d[i][2] - d[i][1]);
                store(row + 3 * w.place, d[i][1] - d[i][3]);
            }
        }
    }
}

/// A^T m A, and what follows the sums.
template <int ACTIVATION, int G>
void transform_back(const Winograd& w, void* const* buffers, const Chunk& chunk, int64_t rows, const Channels& own,
                    const float* products) {
    constexpr int EACH = LANES / G;
    const Step& s = w.step;
    const int64_t row = own.vectors * LANES, apart = s.out_channels / s.groups;
    const int64_t begin = chunk.image * s.out_height * s.out_width * s.out_channels + own.first;
    float* y = static_cast<float*>(buffers[s.y]) + begin;
    const float* residual = s.residual < 0 ? nullptr : static_cast<const float*>(buffers[s.residual]) + begin;
    float* sums = s.sums < 0 ? nullptr
                             : static_cast<float*>(buffers[s.sums]) +
                                   (chunk.image * w.bands + chunk.band) * s.out_channels + own.first;
    for (int v = 0; v < own.vectors; v++) {
        const int count = own.each - v * LANES;
        const int64_t k = v * EACH;
        const auto get = [&](const float* p) { return G == 1 ? load(p, count) : gathered<G>(p, apart); };
        const auto put = [&](float* p, Vec z) { G == 1 ? store(p, z, count) : scatter<G>(p, apart, z); };
        const Vec bias = get(s.bias + own.first + k);
        Vec total = {};
        for (int64_t tile = 0; tile < rows * w.across; tile++) {
            const float* from = products + tile * row + v * LANES;
            Vec m[2][4];
            for (int j = 0; j < 4; j++) {
                const Vec a = load(from + j * w.product), b = load(from + (4 + j) * w.product);
                const Vec e = load(from + (8 + j) * w.product), f = load(from + (12 + j) * w.product);
                m[0][j] = a + b + e, m[1][j] = b - e - f;
            }
            const int64_t top = 2 * (chunk.band * w.band + tile / w.across), left = 2 * (tile % w.across);
            for (int i = 0; i < 2 && top + i < s.out_height; i++)
                for (int j = 0; j < 2 && left + j < s.out_width; j++) {
                    const int64_t at = ((top + i) * s.out_width + left + j) * s.out_channels + k;
                    Vec z = bias + one_by_one<G>(j ? m[i][1] - m[i][2] - m[i][3] : m[i][0] + m[i][1] + m[i][2]);
                    if (residual) z += get(residual + at);
                    z = activate<float>(z, ACTIVATION);
                    total += z;
                    put(y + at, z);
                }
        }
        if (sums) put(sums + k, total);
    }
}

template <int G>
void winograd_chunk(const Winograd& w, int64_t number, void* const* buffers, const Chunk& chunk, Scratch& scratch) {
    const Step& s = w.step;
    const Channels& own = w.tiles[chunk.block];
    const int64_t rows = std::min(w.band, w.rows - chunk.band * w.band), some = rows * w.across;
    const int64_t row = own.vectors * LANES, width = w.per_group * G;
    float* panel = reinterpret_cast<float*>(scratch.panel);
    float* products = panel + PLACES * w.place;
    const bool same = scratch.step == number && scratch.image == chunk.image && scratch.slice == own.slice;
    if (!same || scratch.begin != chunk.band) {
        const float* x = static_cast<const float*>(buffers[s.x]) + chunk.image * s.height * s.width * s.channels;
        transform<G>(w, x + own.slice, chunk.band * w.band, rows, panel);
        scratch.step = number, scratch.image = chunk.image, scratch.slice = own.slice, scratch.begin = chunk.band;
    }
    const Kernels& kernels = kernels_of<Singles, float>(own.vectors, G);
    const int64_t taps[] = {0}, pieces = divided(some, kernels.most);
    Tile tile = {};
    tile.step = width, tile.taps = taps, tile.tap_count = 1, tile.units = int(w.per_group), tile.few = FEW_TERMS;
    tile.pitch = row, tile.channels = int(row), tile.groups = 1, tile.raw = true;
    for (int place = 0; place < PLACES; place++) {
        const float* weight = static_cast<const float*>(s.weight) + own.weight + place * w.per_group * row;
        tile.weight = weight;
        for (int64_t piece = 0, done = 0; piece < pieces; piece++) {
            const int64_t size = some / pieces + (piece < some % pieces);
            tile.x = panel + place * w.place + done * width;
            tile.y = products + place * w.product + done * row;
            ask(tile, weight, w.per_group * LANES, own.vectors, piece, pieces);
            kernels.by_pixels[size](tile);
            done += size;
        }
    }
    with_activation(int(s.activation), [&](auto known) {
        transform_back<decltype(known)::value, G>(w, buffers, chunk, rows, own, products);
    });
}

inline void winograd_chunk(const Winograd& w, int64_t number, void* const* buffers, int64_t order, Scratch& scratch) {
    const Chunk chunk = w.chunk(order);
    w.tiles[chunk.block].together == 2 ? winograd_chunk<2>(w, number, buffers, chunk, scratch)
                                       : winograd_chunk<1>(w, number, buffers, chunk, scratch);
}

/// Lay out G w G^T, in the order in which `winograd_chunk` reads it.
inline void pack_winograd(const Winograd& w, const float* weight, float* packed, int threads) {
    const int64_t channels = w.per_group, out_channels = w.step.out_channels / w.step.groups;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < w.tiles.size(); i++) {
        const Channels& own = w.tiles[i];
        const int64_t lanes = own.vectors * LANES;
        for (int64_t l = 0; l < lanes; l++) {
            const int64_t group = l % own.together, k = l / own.together;
            for (int64_t c = 0; c < channels; c++) {
                float* to = packed + own.weight + c * lanes + l;
                double rows[4][3] = {};
                if (k < own.each && group < own.groups) {
                    const float* g = weight + ((own.first + group * out_channels + k) * channels + c) * 9;
                    for (int j = 0; j < 3; j++) {
                        const double a = g[j], b = g[3 + j], e = g[6 + j];
                        rows[0][j] = a, rows[1][j] = (a + b + e) / 2, rows[2][j] = (a - b + e) / 2, rows[3][j] = e;
                    }
                }
                for (int p = 0; p < 4; p++) {
                    const double a = rows[p][0], b = rows[p][1], e = rows[p][2];
                    const double made[] = {a, (a + b + e) / 2, (a - b + e) / 2, e};
                    for (int q = 0; q < 4; q++) to[(4 * p + q) * channels * lanes] = float(made[q]);
                }
            }
        }
    }
}

}  // namespace

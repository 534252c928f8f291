// A dense 3x3 convolution in float32 by Winograd's F(2x2, 3x3): of four values, 16 products in the place of 36.
//
// y = A^T [(G w G^T) * (B^T x B)] A for each tile of 2x2 values, from 4x4 of the input, where * is over values and summed
// over channels:
//
//     B^T = 1  0 -1  0    G = 1    0    0     A^T = 1  1  1  0
//           0  1  1  0        1/2  1/2  1/2         0  1 -1 -1
//           0 -1  1  0        1/2 -1/2  1/2
//           0  1  0 -1        0    0    1
//
// The products of each of the 16 places are those of a 1x1 convolution over tiles, by its kernels. Source: A. Lavin and
// S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015.

#pragma once

#include "convolution.h"

namespace {

constexpr int PLACES = 16;
constexpr int64_t TILES = 32;  // in a chunk, at most: a weight that is read serves so many

/// The pixels that a band of tiles begins with, and what is kept of it.
struct Winograd {
    Step step;
    std::vector<Channels> tiles;
    int64_t rows, across;         // of tiles
    int64_t band, bands;          // rows of tiles
    int64_t place, product;       // numbers between two places, of tiles and of products
    int64_t panel;                // bytes

    explicit Winograd(const Step& given) : step(given), tiles(Conv(given).tiles) {
        rows = divided(step.out_height, 2), across = divided(step.out_width, 2);
        const int64_t most = std::max<int64_t>(1, TILES / across);
        bands = divided(rows, most), band = divided(rows, bands), bands = divided(rows, band);
        place = band * across * step.channels + LANES;  // not a multiple of a page
        int64_t weight = 0, widest = 0;
        for (Channels& tile : tiles) {
            tile.weight = weight;
            weight += PLACES * step.channels * tile.vectors * LANES;
            widest = std::max<int64_t>(widest, tile.vectors * LANES);
        }
        product = band * across * widest + LANES;
        panel = PLACES * (place + product) * 4;
    }

    int64_t chunks() const { return step.images * bands * int64_t(tiles.size()); }
};

/// B^T x B of some rows of tiles.
__attribute__((noinline)) inline void transform(const Winograd& w, const float* x, int64_t first, int64_t rows,
                                                float* out) {
    const Step& s = w.step;
    for (int64_t tile = 0; tile < rows * w.across; tile++) {
        const int64_t top = 2 * (first + tile / w.across) - s.padding[0], left = 2 * (tile % w.across) - s.padding[1];
        const bool inside = top >= 0 && left >= 0 && top + 4 <= s.height && left + 4 <= s.width;
        float* to = out + tile * s.channels;
        for (int64_t c = 0; c < s.channels; c += LANES) {
            Vec d[4][4];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    const int64_t row = top + i, column = left + j;
                    const bool there = inside || (row >= 0 && row < s.height && column >= 0 && column < s.width);
                    d[i][j] = there ? load(x + (row * s.width + column) * s.channels + c) : Vec{};
                }
            for (int j = 0; j < 4; j++) {
                const Vec a = d[0][j] - d[2][j], b = d[1][j] + d[2][j], e = d[2][j] - d[1][j], f = d[1][j] - d[3][j];
                d[0][j] = a, d[1][j] = b, d[2][j] = e, d[3][j] = f;
            }
            for (int i = 0; i < 4; i++) {
                float* row = to + 4 * i * w.place + c;
                store(row, d[i][0] - d[i][2]);
                store(row + w.place, d[i][1] + d[i][2]);
                store(row + 2 * w.place, d[i][2] - d[i][1]);
                store(row + 3 * w.place, d[i][1] - d[i][3]);
            }
        }
    }
}

/// A^T m A, and what follows the sums.
template <int ACTIVATION>
void transform_back(const Winograd& w, void* const* buffers, int64_t image, int64_t band, int64_t rows,
                    const Channels& own, const float* products) {
    const Step& s = w.step;
    const int64_t row = own.vectors * LANES;
    float* y = static_cast<float*>(buffers[s.y]) + image * s.out_height * s.out_width * s.out_channels + own.first;
    const float* residual =
        s.residual < 0 ? nullptr
                       : static_cast<const float*>(buffers[s.residual]) +
                             image * s.out_height * s.out_width * s.out_channels + own.first;
    float* sums = s.sums < 0 ? nullptr
                             : static_cast<float*>(buffers[s.sums]) + (image * w.bands + band) * s.out_channels + own.first;
    for (int64_t k = 0; k < row; k += LANES) {
        const Vec bias = load(s.bias + own.first + k);
        Vec total = {};
        for (int64_t tile = 0; tile < rows * w.across; tile++) {
            const float* from = products + tile * row + k;
            Vec m[2][4];
            for (int j = 0; j < 4; j++) {
                const Vec a = load(from + j * w.product), b = load(from + (4 + j) * w.product);
                const Vec e = load(from + (8 + j) * w.product), f = load(from + (12 + j) * w.product);
                m[0][j] = a + b + e, m[1][j] = b - e - f;
            }
            const int64_t top = 2 * (band * w.band + tile / w.across), left = 2 * (tile % w.across);
            for (int i = 0; i < 2 && top + i < s.out_height; i++)
                for (int j = 0; j < 2 && left + j < s.out_width; j++) {
                    const int64_t at = ((top + i) * s.out_width + left + j) * s.out_channels + k;
                    Vec z = bias + (j ? m[i][1] - m[i][2] - m[i][3] : m[i][0] + m[i][1] + m[i][2]);
                    if (residual) z += load(residual + at);
                    z = activate(z, ACTIVATION);
                    total += z;
                    store(y + at, z);
                }
        }
        if (sums) store(sums + k, total);
    }
}

inline void winograd_chunk(const Winograd& w, int64_t number, void* const* buffers, int64_t order, Scratch& scratch) {
    static constexpr float none[(MOST_VECTORS + 1) * LANES] = {};
    const Step& s = w.step;
    const int64_t count = int64_t(w.tiles.size()), band = order / count % w.bands, image = order / count / w.bands;
    const Channels& own = w.tiles[order % count];
    const int64_t rows = std::min(w.band, w.rows - band * w.band), some = rows * w.across, row = own.vectors * LANES;
    float* panel = reinterpret_cast<float*>(scratch.panel);
    float* products = panel + PLACES * w.place;
    if (scratch.step != number || scratch.image != image || scratch.begin != band) {
        const float* x = static_cast<const float*>(buffers[s.x]) + image * s.height * s.width * s.channels;
        transform(w, x, band * w.band, rows, panel);
        scratch.step = number, scratch.image = image, scratch.begin = band, scratch.slice = -1;
    }
    const Kernels& kernels = kernels_of<Singles, float>(own.vectors, 1);
    const int64_t taps[] = {0}, pieces = divided(some, kernels.most);
    Tile tile = {};
    tile.step = s.channels, tile.taps = taps, tile.tap_count = 1, tile.units = int(s.channels);
    tile.bias = none, tile.pitch = row, tile.channels = int(row), tile.groups = 1, tile.activation = NONE;
    for (int place = 0; place < PLACES; place++) {
        tile.weight = static_cast<const float*>(s.weight) + own.weight + place * s.channels * row;
        for (int64_t piece = 0, done = 0; piece < pieces; piece++) {
            const int64_t size = some / pieces + (piece < some % pieces);
            tile.x = panel + place * w.place + done * s.channels;
            tile.y = products + place * w.product + done * row;
            kernels.by_pixels[size](tile);
            done += size;
        }
    }
    switch (s.activation) {
        case RELU:
            return transform_back<RELU>(w, buffers, image, band, rows, own, products);
        case SILU:
            return transform_back<SILU>(w, buffers, image, band, rows, own, products);
        case SIGMOID:
            return transform_back<SIGMOID>(w, buffers, image, band, rows, own, products);
        default:
            return transform_back<NONE>(w, buffers, image, band, rows, own, products);
    }
}

/// Lay out G w G^T, in the order in which `winograd_chunk` reads it.
inline void pack_winograd(const Winograd& w, const float* weight, float* packed, int threads) {
    const int64_t channels = w.step.channels;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < w.tiles.size(); i++) {
        const Channels& own = w.tiles[i];
        const int64_t lanes = own.vectors * LANES;
        for (int64_t l = 0; l < lanes; l++)
            for (int64_t c = 0; c < channels; c++) {
                const float* g = weight + ((own.first + l) * channels + c) * 9;
                double rows[4][3];
                for (int j = 0; j < 3; j++) {
                    const double a = g[j], b = g[3 + j], e = g[6 + j];
                    rows[0][j] = a, rows[1][j] = (a + b + e) / 2, rows[2][j] = (a - b + e) / 2, rows[3][j] = e;
                }
                float* to = packed + own.weight + c * lanes + l;
                for (int p = 0; p < 4; p++) {
                    const double a = rows[p][0], b = rows[p][1], e = rows[p][2];
                    const double made[] = {a, (a + b + e) / 2, (a - b + e) / 2, e};
                    for (int q = 0; q < 4; q++) to[(4 * p + q) * channels * lanes] = float(made[q]);
                }
            }
    }
}

}  // namespace

// A chunk of a convolution, by its plan, and the layout of its weights.

#pragma once

#include <algorithm>
#include <type_traits>

#include "panel.h"

namespace {

template <typename A, typename T>
void conv_chunk(const Conv& conv, int64_t number, void* const* buffers, int64_t order, Scratch& scratch) {
    using Unit = typename A::Unit;
    const Step& s = conv.step;
    const Chunk chunk = conv.place(order);
    const int64_t first = chunk.band * conv.band, image = chunk.image, slots = conv.flat ? 1 : conv.panel_rows();
    const int64_t rows = conv.flat ? 1 : std::min(conv.band, s.out_height - first);
    const int64_t row = conv.flat ? std::min(conv.band, conv.pixels - first) : s.out_width;
    const int64_t merged = conv.merged ? s.kernel[1] : 1, across = s.kernel[1] / merged;
    int64_t taps[conv.taps];
    char edges[conv.taps];
    Tile tile = {};
    tile.units = int(conv.units * merged), tile.few = s.width == 1 ? FEW_OF_VECTORS : FEW_TERMS;
    tile.step = conv.pitch * (conv.flat ? 1 : s.stride[1]);
    tile.pitch = s.out_channels, tile.apart = s.out_channels / s.groups, tile.activation = int(s.activation);
    for (int i = conv.blocks[chunk.block]; i < conv.blocks[chunk.block + 1]; i++) {
        const Channels& own = conv.tiles[i];
        const Unit* x;
        if (conv.direct) {
            x = reinterpret_cast<const Unit*>(static_cast<const T*>(buffers[s.x]) +
                                              (image * conv.pixels + first) * s.channels);
        } else {
            bring<A, T>(conv, number, buffers, chunk, rows, row, own, scratch);
            x = reinterpret_cast<const Unit*>(scratch.panel) + own.offset;
        }
        const Unit* weight = static_cast<const Unit*>(s.weight) + own.weight;
        tile.bias = s.bias + own.first, tile.channels = own.each, tile.groups = own.groups;
        tile.sums = nullptr;
        if (s.sums >= 0) {
            tile.sums = static_cast<float*>(buffers[s.sums]) + (image * conv.bands + chunk.band) * s.out_channels +
                        own.first;
            for (int g = 0; g < own.groups; g++) std::fill_n(tile.sums + g * tile.apart, own.each, 0.0f);
        }
        const Kernels& kernels = kernels_of<A, T>(own.vectors, own.together);
        const int64_t pieces = divided(row, kernels.most), of_a_vector = conv.taps * conv.units * LANES;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t start = conv.flat ? image * conv.pixels + first
                                            : (image * s.out_height + first + r) * s.out_width;
            const Rows reached = conv.reached(first + r);
            for (int64_t t = 0; t < reached.count * across; t++) {
                const int64_t down = (first + r) * s.stride[0] + (reached.first + t / across) * s.dilation[0];
                taps[t] = (conv.flat ? 0 : down % slots * conv.panel_width + t % across * s.dilation[1]) * conv.pitch;
            }
            tile.taps = taps, tile.tap_count = int(reached.count * across);
            tile.weight = weight + reached.first * s.kernel[1] * conv.units * own.vectors * LANES;
            for (int64_t piece = 0, done = 0; piece < pieces; piece++) {
                const int64_t size = row / pieces + (piece < row % pieces);
                const int64_t y = (start + done) * s.out_channels + own.first;
                tile.x = x + done * (conv.flat ? 1 : s.stride[1]) * conv.pitch;
                tile.edges = nullptr;
                if (!conv.merged && s.padding[1] && (piece == 0 || piece == pieces - 1)) {
                    for (int t = 0; t < tile.tap_count; t++) edges[t] = conv.edge(t % across, done, done + size - 1);
                    tile.edges = edges;
                }
                ask(tile, weight, of_a_vector, own.vectors, r * pieces + piece, rows * pieces);
                tile.y = static_cast<T*>(buffers[s.y]) + y;
                tile.residual = s.residual < 0 ? nullptr : static_cast<const T*>(buffers[s.residual]) + y;
                kernels.by_pixels[size](tile);
                done += size;
            }
        }
    }
}

template <typename A>
void pack(const Conv& conv, const float* weight, void* packed, int threads) {
    using Stored = std::conditional_t<A::PER_UNIT == 1, float, Bf16>;
    const int64_t size = conv.per_group * conv.taps, out_channels = conv.step.out_channels / conv.step.groups;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < conv.tiles.size(); i++) {
        const Channels& tile = conv.tiles[i];
        const int64_t lanes = tile.vectors * LANES;
        Stored* out = static_cast<Stored*>(packed) + tile.weight * A::PER_UNIT;
        for (int64_t l = 0; l < lanes; l++) {
            const int64_t group = l % tile.together, number = l / tile.together;
            const float* own = weight + (tile.first + group * out_channels + number) * size;
            for (int64_t u = 0; u < conv.units; u++)
                for (int part = 0; part < A::PER_UNIT; part++) {
                    const int64_t c = u * A::PER_UNIT + part;
                    const bool there = number < tile.each && group < tile.groups && c < conv.per_group;
                    for (int64_t t = 0; t < conv.taps; t++)
                        put(out + ((t * conv.units + u) * lanes + l) * A::PER_UNIT + part,
                            there ? own[c * conv.taps + t] : 0.0f);
                }
        }
    }
}

}  // namespace

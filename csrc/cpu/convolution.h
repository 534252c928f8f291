// A convolution as a step of a program: which kernels compute which output channels, how the work is cut into chunks,
// how input is brought into place for them, and how weights are laid out.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace {

enum Kind { CONV, MEANS, AFFINE };

}  // namespace

/// A step, as Python gives it. Maps are numbers of buffers, -1 for none.
extern "C" struct Step {
    int64_t kind, activation;
    int64_t images, channels, height, width;              // of x
    int64_t out_channels, out_height, out_width;          // of y
    int64_t kernel[2], stride[2], padding[2], dilation[2], groups;
    int64_t bfloat16;  // maps and weights, else float32; never the sums, the means or what a gate is
    int64_t planar;    // x is an image in NCHW
    int64_t before;    // activation of x * gate * scale + shift, which is what is read
    const void* weight;         // as `pack_weight` lays it out
    const float *bias;          // a whole number of vectors
    const float *scale, *shift;  // for each channel of x, or null
    int64_t x, y, residual, gate, sums;
};

namespace {

constexpr double CHUNK = 7e5;          // multiplications and additions in one, about
constexpr int64_t PANEL = 128 << 10;   // bytes of input that stay in the second cache
constexpr int64_t FEW_PIXELS = 28;     // that a weight is read for, at least
constexpr int64_t SLICE = 48;          // channels that are brought into place together, at least

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum Lanes { WHOLE, HALF, LANE };

/// The output channels of one call of a kernel.
struct Channels {
    Lanes lanes;
    int vectors, beside, first, count;
    int64_t weight;            // in units from the first weight
    int slice, slice_channels; // the input channels that are brought into place for it
    int offset;                // of its own first one in the slice
};

/// Some rows of a kernel.
struct Rows {
    int64_t first, count;
};

struct Conv {
    Step step;
    std::vector<Channels> tiles;
    std::vector<int> blocks;  // the first tile of each chunk, and the end
    int64_t taps, per_group, units;
    bool flat, direct;  // pixels one after the other; read from x itself
    bool merged;        // the taps of a kernel's row are one, since what they read lies together
    int64_t images, pixels, bands, band;  // rows, or pixels where it is flat
    int64_t pitch, panel_width, panel;    // units of a pixel, pixels of a row, bytes

    explicit Conv(const Step& given) : step(given) {
        tile();
        cut();
    }

    int per_unit() const { return step.bfloat16 ? Pairs::PER_UNIT : 1; }

    void tile() {
        const int64_t groups = step.groups, in = step.channels / groups, out = step.out_channels / groups;
        taps = step.kernel[0] * step.kernel[1];
        per_group = in;
        units = std::max<int64_t>(1, divided(in, per_unit()));
        int64_t weight = 0;
        const auto add = [&](Lanes lanes, int vectors, int beside, int64_t first, int64_t count, int64_t slice) {
            const Channels made = {lanes, vectors, beside, int(first), int(count), weight, int(slice), 0, 0};
            tiles.push_back(made);
            weight += taps * units * vectors * LANES;
        };
        const auto add_whole = [&](int64_t first, int64_t count, int64_t slice) {
            const int64_t vectors = divided(count, LANES), calls = divided(vectors, MOST_VECTORS);
            for (int64_t i = 0, done = 0; i < calls; i++) {
                const int64_t some = vectors / calls + (i < vectors % calls);
                add(WHOLE, int(some), 0, first + done * LANES, std::min(some * LANES, count - done * LANES), slice);
                done += some;
            }
        };
        if (groups == 1 || out % LANES == 0) {
            for (int64_t g = 0; g < groups; g++) add_whole(g * out, out, g * in);
        } else if (out > LANES / 2 && LANES == 16) {  // an odd number of half vectors: two groups at a time
            const int64_t beside = out / LANES, alone = std::min<int64_t>(beside, 3);
            for (int64_t g = 0; g < groups; g += 2) {
                const int64_t first = g * out, more = beside - alone;
                const int64_t end = std::min((g + 2) * out, step.out_channels);
                if (more) add_whole(first, more * LANES, g * in);
                const int64_t middle = first + more * LANES, stop = std::min(end, middle + (2 * alone + 1) * LANES);
                add(HALF, int(2 * alone + 1), int(alone), middle, stop - middle, g * in);
                if (more && end > stop) add_whole(stop, end - stop, (g + 1) * in);
            }
        } else {
            for (int64_t k = 0; k < step.out_channels; k += LANES)
                add(LANE, 1, 0, k, std::min<int64_t>(LANES, step.out_channels - k), k);
        }
        slices();
    }

    /// Neighbouring groups are brought into place together.
    void slices() {
        const bool pairs = tiles[0].lanes == HALF || (step.groups > 1 && out_of_group() % LANES);
        const int64_t own = step.groups == 1 ? step.channels
                            : tiles[0].lanes == LANE ? LANES
                            : pairs ? 2 * per_group : per_group;
        const int64_t size = step.groups == 1 ? own : own * divided(SLICE, own);
        for (Channels& tile : tiles) {
            const int64_t begin = tile.slice / size * size;
            tile.offset = int((tile.slice - begin) / per_unit());
            tile.slice = int(begin);
            tile.slice_channels = int(std::min(size, step.channels - begin));
        }
        pitch = divided(size, per_unit());
    }

    int64_t out_of_group() const { return step.out_channels / step.groups; }

    void cut() {
        const bool plain = step.kernel[0] == 1 && step.kernel[1] == 1;
        const bool strided = step.stride[0] != 1 || step.stride[1] != 1, padded = step.padding[0] || step.padding[1];
        const bool read = step.gate >= 0 || step.scale || step.planar;
        const bool as_stored = !step.bfloat16 || Pairs::PER_UNIT == 2;
        flat = plain && !padded;
        direct = flat && !strided && !read && as_stored && step.channels % per_unit() == 0 && step.groups == 1;
        const bool by_image = read || strided || step.sums >= 0 || !flat;
        merged = step.groups == 1 && step.dilation[1] == 1;
        images = by_image ? step.images : 1;
        pixels = step.out_height * step.out_width * (by_image ? 1 : step.images);
        if (direct) pitch = step.channels / per_unit();
        const int64_t rows = flat ? pixels : step.out_height, row = flat ? 1 : step.out_width;
        panel_width = flat ? 1 : (step.out_width - 1) * step.stride[1] + (step.kernel[1] - 1) * step.dilation[1] + 1;
        const double tile_work = double(row) * taps * per_group * step.out_channels * tiles[0].slice_channels /
                                 (step.groups == 1 ? tiles[0].slice_channels : step.channels);
        const bool whole = step.groups == 1;
        int64_t most = std::max<int64_t>(1, int64_t(CHUNK / tile_work));
        if (whole) most = std::max(most, divided(FEW_PIXELS, row));
        const int64_t bytes = panel_width * pitch * 4;
        const int64_t fit = flat ? PANEL / bytes : (PANEL / bytes - reach()) / step.stride[0] + 1;
        most = std::max(std::min(most, fit), whole ? divided(FEW_PIXELS, row) : int64_t(1));
        if (flat && most < rows) most = divided(most, best_pixels()) * best_pixels();
        bands = divided(rows, std::min(most, rows));
        band = divided(rows, bands);
        if (flat && bands > 1) band = divided(band, best_pixels()) * best_pixels();
        bands = divided(rows, band);
        panel = direct ? 0 : (flat ? band : (band - 1) * step.stride[0] + reach()) * panel_width * pitch * 4 + 4 * BYTES;
        block(row);
    }

    /// Rows that an output row reads.
    int64_t reach() const { return (step.kernel[0] - 1) * step.dilation[0] + 1; }

    /// The kernel's rows that read the image, and not its padding, for an output row.
    Rows reached(int64_t row) const {
        if (flat) return {0, 1};
        const int64_t top = row * step.stride[0] - step.padding[0], down = step.dilation[0];
        const int64_t above = top < 0 ? divided(-top, down) : 0;
        const int64_t within = top < step.height ? divided(step.height - top, down) : 0;
        const int64_t begin = std::min(above, step.kernel[0]), end = std::min(within, step.kernel[0]);
        return {begin, std::max<int64_t>(0, end - begin)};
    }

    int64_t best_pixels() const { return std::min(7, most_pixels(tiles[0].vectors)); }

    /// Tiles that share their slice and have work enough for a chunk.
    void block(int64_t row) {
        double work = 0;
        for (size_t i = 0; i < tiles.size(); i++) {
            const bool other = i && tiles[i].slice != tiles[i - 1].slice;
            if (!i || (work >= CHUNK / 2 && (other || step.groups == 1))) blocks.push_back(int(i)), work = 0;
            work += double(band * row) * taps * per_group * tiles[i].count;
        }
        blocks.push_back(int(tiles.size()));
    }

    int64_t chunks() const { return images * bands * int64_t(blocks.size() - 1); }
};

/// What a thread holds: the input of some rows, brought into place.
struct Scratch {
    char* panel;
    int64_t step = -1, band = -1, slice = -1;
};

/// A pixel's channels as they are read, and as the arithmetic takes them.
template <typename A, typename T>
struct Reader {
    using Stored = std::conditional_t<A::PER_UNIT == 1, float, Bf16>;

    const Conv& conv;
    const float *gate, *scale, *shift;
    int64_t channels, pitch, plane;

    Reader(const Conv& conv, void* const* buffers, int64_t image, const Channels& tile) : conv(conv) {
        const Step& s = conv.step;
        gate = s.gate < 0 ? nullptr : static_cast<const float*>(buffers[s.gate]) + image * s.channels + tile.slice;
        scale = s.scale ? s.scale + tile.slice : nullptr;
        shift = s.scale ? s.shift + tile.slice : nullptr;
        channels = tile.slice_channels, pitch = conv.pitch * A::PER_UNIT;
        plane = s.planar ? s.height * s.width : 1;
    }

    /// Some pixels of a row, `step` numbers after each other.
    void put_row(const T* x, int64_t step, int64_t pixels, Stored* out) const {
        if (plane == 1 && std::is_same<T, Stored>::value && !gate && !scale && step == channels && step == pitch) {
            std::memcpy(static_cast<void*>(out), x, pixels * channels * sizeof(T));
        } else if (plane == 1) {
            for (int64_t p = 0; p < pixels; p++) put(x + p * step, out + p * pitch);
        } else {
            for (int64_t c = 0; c < pitch; c++)
                for (int64_t p = 0; p < pixels; p++)
                    out[p * pitch + c] = c < channels ? converted(x[c * plane + p * step]) : Stored{};
        }
    }

    static ALWAYS Stored converted(Stored value) { return value; }

    template <typename S>
    static ALWAYS std::enable_if_t<!std::is_same<S, Stored>::value, Stored> converted(S value) {
        Stored made;
        store(&made, load(&value, 1), 1);
        return made;
    }

    ALWAYS void put(const T* x, Stored* out) const {
        if (!gate && !scale) {
            if (std::is_same<T, Stored>::value) {
                std::memcpy(out, x, channels * sizeof(T));
            } else {
                for (int64_t c = 0; c < channels; c += LANES) {
                    const int count = int(std::min<int64_t>(LANES, channels - c));
                    store(out + c, load(x + c, count), count);
                }
            }
        } else {
            for (int64_t c = 0; c < channels; c += LANES) {
                const int count = int(std::min<int64_t>(LANES, channels - c));
                Vec z = load(x + c, count);
                if (gate) z *= load(gate + c, count);
                if (scale) z = activate(z * load(scale + c, count) + load(shift + c, count), int(conv.step.before));
                store(out + c, z, count);
            }
        }
        if (channels < pitch) std::memset(static_cast<void*>(out + channels), 0, (pitch - channels) * sizeof(Stored));
    }
};

/// Bring into place what a band of output reads of the channels of a tile.
template <typename A, typename T>
__attribute__((noinline)) void fill(const Conv& conv, void* const* buffers, int64_t image, int64_t band,
                                    const Channels& tile, char* panel) {
    using Stored = typename Reader<A, T>::Stored;
    const Step& s = conv.step;
    const Reader<A, T> reader(conv, buffers, image, tile);
    const T* x = static_cast<const T*>(buffers[s.x]) + image * s.channels * s.height * s.width +
                 (s.planar ? 0 : tile.slice);
    const int64_t step = s.planar ? 1 : s.channels, first = band * conv.band;
    Stored* out = reinterpret_cast<Stored*>(panel);
    if (conv.flat) {
        const int64_t end = std::min(first + conv.band, conv.pixels);
        for (int64_t p = first; p < end; p++, out += reader.pitch) {
            const int64_t row = p / s.out_width * s.stride[0], column = p % s.out_width * s.stride[1];
            reader.put_row(x + (row * s.width + column) * step, step, 1, out);
        }
        return;
    }
    const int64_t rows = (std::min(conv.band, s.out_height - first) - 1) * s.stride[0] + conv.reach();
    const int64_t left = std::min(s.padding[1], conv.panel_width);
    const int64_t inside = std::max<int64_t>(0, std::min(conv.panel_width - left, s.width));
    for (int64_t r = 0; r < rows; r++) {
        const int64_t row = first * s.stride[0] - s.padding[0] + r;
        const bool outside = row < 0 || row >= s.height;
        const int64_t before = outside ? conv.panel_width : left;
        std::memset(static_cast<void*>(out), 0, before * reader.pitch * sizeof(Stored));
        out += before * reader.pitch;
        if (outside) continue;
        const T* from = x + row * s.width * step;
        reader.put_row(from, step, inside, out);
        out += inside * reader.pitch;
        const int64_t after = conv.panel_width - left - inside;
        std::memset(static_cast<void*>(out), 0, after * reader.pitch * sizeof(Stored));
        out += after * reader.pitch;
    }
}

template <typename A, typename T>
const Kernels& kernels_of(const Conv& conv, const Channels& tile) {
    if (tile.lanes == HALF) return half_kernels<A, T>(tile.beside);
    return tile.lanes == LANE ? lane_kernels<A, T>(int(conv.per_group)) : whole_kernels<A, T>(tile.vectors);
}

template <typename A, typename T>
void conv_chunk(const Conv& conv, int64_t number, void* const* buffers, int64_t chunk, Scratch& scratch) {
    using Unit = typename A::Unit;
    const Step& s = conv.step;
    const int64_t blocks = int64_t(conv.blocks.size()) - 1, block = chunk % blocks, at = chunk / blocks;
    const int64_t band = at % conv.bands, image = at / conv.bands;
    const int64_t first = band * conv.band;
    const int64_t rows = conv.flat ? 1 : std::min(conv.band, s.out_height - first);
    const int64_t row = conv.flat ? std::min(conv.band, conv.pixels - first) : s.out_width;
    const int64_t merged = conv.merged ? s.kernel[1] : 1, across = s.kernel[1] / merged;
    int64_t taps[conv.taps];
    for (int64_t t = 0; t < s.kernel[0] * across; t++)
        taps[t] = (t / across * s.dilation[0] * conv.panel_width + t % across * s.dilation[1]) * conv.pitch;
    Tile tile;
    tile.units = int(conv.units * merged);
    tile.step = conv.pitch * (conv.flat ? 1 : s.stride[1]);
    tile.other = conv.units, tile.pitch = s.out_channels, tile.activation = int(s.activation);
    for (int i = conv.blocks[block]; i < conv.blocks[block + 1]; i++) {
        const Channels& own = conv.tiles[i];
        const Unit* x;
        if (conv.direct) {
            x = reinterpret_cast<const Unit*>(static_cast<const T*>(buffers[s.x]) +
                                              (image * conv.pixels + first) * s.channels);
        } else {
            if (scratch.step != number || scratch.band != at || scratch.slice != own.slice) {
                fill<A, T>(conv, buffers, image, band, own, scratch.panel);
                scratch.step = number, scratch.band = at, scratch.slice = own.slice;
            }
            x = reinterpret_cast<const Unit*>(scratch.panel) + own.offset;
        }
        const Unit* weight = static_cast<const Unit*>(s.weight) + own.weight;
        tile.bias = s.bias + own.first, tile.channels = own.count;
        tile.sums = nullptr;
        if (s.sums >= 0) {
            tile.sums = static_cast<float*>(buffers[s.sums]) + at * s.out_channels + own.first;
            std::fill(tile.sums, tile.sums + own.count, 0.0f);
        }
        const Kernels& kernels = kernels_of<A, T>(conv, own);
        const int64_t pieces = divided(row, kernels.most);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t start = conv.flat ? image * conv.pixels + first
                                            : (image * s.out_height + first + r) * s.out_width;
            const Rows reached = conv.reached(first + r);
            tile.taps = taps + reached.first * across, tile.tap_count = int(reached.count * across);
            tile.weight = weight + reached.first * s.kernel[1] * conv.units * own.vectors * LANES;
            for (int64_t piece = 0, done = 0; piece < pieces; piece++) {
                const int64_t size = row / pieces + (piece < row % pieces);
                const int64_t y = (start + done) * s.out_channels + own.first;
                tile.x = x + (conv.flat ? done * conv.pitch
                                        : (r * s.stride[0] * conv.panel_width + done * s.stride[1]) * conv.pitch);
                tile.y = static_cast<T*>(buffers[s.y]) + y;
                tile.residual = s.residual < 0 ? nullptr : static_cast<const T*>(buffers[s.residual]) + y;
                kernels.by_pixels[size](tile);
                done += size;
            }
        }
    }
}

ALWAYS void put(float* p, float value) { *p = value; }

ALWAYS void put(Bf16* p, float value) { store(p, all(value), 1); }

template <typename A>
void pack(const Conv& conv, const float* weight, void* packed, int threads) {
    using Stored = std::conditional_t<A::PER_UNIT == 1, float, Bf16>;
    const int64_t size = conv.per_group * conv.taps;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < conv.tiles.size(); i++) {
        const Channels& tile = conv.tiles[i];
        const int64_t lanes = tile.vectors * LANES;
        Stored* out = static_cast<Stored*>(packed) + tile.weight * A::PER_UNIT;
        for (int64_t l = 0; l < lanes; l++)
            for (int64_t u = 0; u < conv.units; u++)
                for (int part = 0; part < A::PER_UNIT; part++) {
                    const int64_t k = tile.first + l;
                    int64_t c = u * A::PER_UNIT + part;
                    if (conv.per_group == 1) c = k % A::PER_UNIT == part ? 0 : 1;
                    const bool there = l < tile.count && c < conv.per_group;
                    const float* from = weight + k * size + c * conv.taps;
                    for (int64_t t = 0; t < conv.taps; t++)
                        put(out + ((t * conv.units + u) * lanes + l) * A::PER_UNIT + part, there ? from[t] : 0.0f);
                }
    }
}

}  // namespace

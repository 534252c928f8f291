// The plan of a convolution as a step of a program: which kernels compute which output channels, and how the work is cut
// into chunks.

#pragma once

#include <algorithm>
#include <vector>

#include <unistd.h>

#include "kernels.h"

namespace {

enum Kind { CONV, MEANS, AFFINE, LARGEST, AVERAGE, WINDOW_MEAN };

enum Way { DIRECT, WINOGRAD, DEPTHWISE, MATRIX };

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
    int64_t way;       // of a convolution, for which its weights are laid out
    const void* weight;         // as `pack_weight` lays it out
    const float *bias;          // a whole number of vectors
    const float *scale, *shift;  // for each channel of x, or null
    int64_t x, y, residual, gate, sums;
};

namespace {

constexpr double CHUNK = 7e5;          // multiplications and additions in one at most, about
constexpr double LEAST_CHUNK = 1e5;    // and at least
constexpr double CHUNKS = 24;          // of a step, about, where they are between these
constexpr int64_t FEW_UNITS = 32;      // of fewer the taps of a kernel's row are read as one
constexpr double FEW_FOR_A_WEIGHT = 8;  // pixels that a weight serves for its reading not to be what takes the time
constexpr int64_t PANEL = 128 << 10;   // bytes of input that stay in the second cache
constexpr int64_t FEW_PIXELS = 28;     // that a weight is read for, at least, and
constexpr int64_t FEW_FOR_MANY = 56;   // where there are many
constexpr int64_t MANY_WEIGHTS = 512 << 10;  // of a group, that do not stay in the second cache
constexpr int64_t SLICE = 48;          // channels that are brought into place together, at least

/// Bytes of the second cache.
inline int64_t second_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return size;
#endif
    return 1 << 20;
}

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The output channels of one call of a kernel: of some groups in turn, of each as many.
struct Channels {
    int vectors, together, first, each, groups;  // `together` groups take turns, `groups` of them are there
    int64_t weight;            // in units from the first weight
    int slice, slice_channels; // the input channels that are brought into place for it
    int offset;                // of its own first ones in the slice, in units

    int count() const { return each * groups; }
};

/// Some rows of a kernel.
struct Rows {
    int64_t first, count;
};

/// The kernel's rows that read the image, and not its padding, for an output row.
inline Rows reached_rows(const Step& s, int64_t row) {
    const int64_t top = row * s.stride[0] - s.padding[0], down = s.dilation[0];
    const int64_t above = top < 0 ? divided(-top, down) : 0;
    const int64_t within = top < s.height ? divided(s.height - top, down) : 0;
    const int64_t begin = std::min(above, s.kernel[0]), end = std::min(within, s.kernel[0]);
    return {begin, std::max<int64_t>(0, end - begin)};
}

/// Multiplications and additions in a chunk, about, where an image has so many.
inline double chunk_of(double work) { return std::min(std::max(work / CHUNKS, LEAST_CHUNK), CHUNK); }

struct Chunk {
    int64_t image, band, block;
};

struct Conv {
    Step step;
    std::vector<Channels> tiles;
    std::vector<int> blocks;  // the first tile of each chunk, and the end
    int64_t taps, per_group, units;  // units of a group
    int64_t together;                // groups whose channels take turns in a vector; of two, a last one is alone
    double chunk;                    // multiplications and additions in one, about
    double waits;                    // by how much more one takes where a weight serves few pixels
    bool bands_first;                // in the order of chunks, bands before channels
    bool flat, direct;  // pixels one after the other; read from x itself
    bool merged;        // the taps of a kernel's row are one, since what they read lies together
    int64_t images, pixels, bands, band;  // rows, or pixels where it is flat
    int64_t pitch, panel_width, panel;    // units of a pixel, pixels of a row, bytes
    int64_t spare;                        // where in it a pixel's channels are put before they are brought into turn

    explicit Conv(const Step& given) : step(given) {
        tile();
        cut();
    }

    int per_unit() const { return step.bfloat16 ? Pairs::PER_UNIT : 1; }

    /// Whether a group has many weights.
    bool many() const { return taps * units * (step.out_channels / step.groups) >= MANY_WEIGHTS; }

    void tile() {
        const int64_t groups = step.groups, out = step.out_channels / groups;
        taps = step.kernel[0] * step.kernel[1];
        per_group = step.channels / groups;
        units = std::max<int64_t>(1, divided(per_group, per_unit()));
        together = groups == 1 || out % LANES == 0 ? 1 : out < LANES ? LANES / out : 2;
        int64_t weight = 0;
        for (int64_t g = 0; g < groups; g += together) {
            const int64_t there = std::min(together, groups - g), turns = together == 2 ? there : together;
            const int64_t most = many() ? std::min(2, MOST_VECTORS) : MOST_VECTORS;
            const int64_t lanes = LANES / turns, vectors = divided(out, lanes), calls = divided(vectors, most);
            for (int64_t i = 0, done = 0; i < calls; i++) {
                const int64_t some = vectors / calls + (i < vectors % calls), each = std::min(some * lanes, out - done);
                const int64_t first = g * out + done;
                tiles.push_back({int(some), int(turns), int(first), int(each), int(there), weight, int(g), 0, 0});
                weight += taps * units * some * LANES;
                done += each;
            }
        }
        slices();
    }

    /// Neighbouring groups are brought into place together.
    void slices() {
        const int64_t size = step.groups == 1 ? 1 : std::max<int64_t>(1, SLICE / (together * per_group)) * together;
        for (Channels& tile : tiles) {
            const int64_t begin = tile.slice / size * size, end = std::min(begin + size, step.groups);
            tile.offset = int((tile.slice - begin) * units);
            tile.slice = int(begin * per_group);
            tile.slice_channels = int((end - begin) * per_group);
        }
        pitch = size * units;
    }

    /// Whether units of several groups are brought into turn, which they are already where a group is one.
    bool turned() const { return together > 1 && (units > 1 || per_group < per_unit()); }

    void cut() {
        const bool plain = step.kernel[0] == 1 && step.kernel[1] == 1;
        const bool strided = step.stride[0] != 1 || step.stride[1] != 1, padded = step.padding[0] || step.padding[1];
        const bool read = step.gate >= 0 || step.scale || step.planar;
        const bool as_stored = !step.bfloat16 || Pairs::PER_UNIT == 2;
        flat = plain && !padded;
        direct = flat && !strided && !read && as_stored && step.channels % per_unit() == 0 && step.groups == 1;
        const bool by_image = read || strided || step.sums >= 0 || !flat;
        merged = step.groups == 1 && step.dilation[1] == 1 && units < FEW_UNITS;
        images = by_image ? step.images : 1;
        pixels = step.out_height * step.out_width * (by_image ? 1 : step.images);
        if (direct) pitch = step.channels / per_unit();
        const int64_t rows = flat ? pixels : step.out_height, row = flat ? 1 : step.out_width;
        panel_width = flat ? 1 : (step.out_width - 1) * step.stride[1] + (step.kernel[1] - 1) * step.dilation[1] + 1;
        const double tile_work = double(row) * taps * per_group * step.out_channels * tiles[0].slice_channels /
                                 (step.groups == 1 ? tiles[0].slice_channels : step.channels);
        const bool whole = step.groups == 1;
        waits = std::max(1.0, FEW_FOR_A_WEIGHT / double(row * rows));
        const double work = waits * double(row * rows) * step.out_channels * taps * per_group;  // of an image
        chunk = chunk_of(work);
        const int64_t weights = step.out_channels * units;  // which stay in the second cache, or are read by one thread
        bands_first = !whole || (direct && weights > pixels * pitch && 4 * weights > second_cache() / 2);
        int64_t most = std::max<int64_t>(1, int64_t(chunk / tile_work));
        const int64_t few = divided(many() ? FEW_FOR_MANY : FEW_PIXELS, row);
        if (whole) most = std::max(most, few);
        const int64_t bytes = panel_width * pitch * 4;
        const int64_t fit = flat ? PANEL / bytes : (PANEL / bytes - reach()) / step.stride[0] + 1;
        most = std::max(std::min(most, fit), whole ? few : int64_t(1));
        if (flat && most < rows) most = divided(most, best_pixels()) * best_pixels();
        bands = divided(rows, std::min(most, rows));
        band = divided(rows, bands);
        if (flat && bands > 1) band = divided(band, best_pixels()) * best_pixels();
        bands = divided(rows, band);
        panel = direct ? 0 : (flat ? band : panel_rows()) * panel_width * pitch * 4 + 4 * BYTES;
        spare = panel;
        if (turned()) panel += pitch * per_unit() * 4 + 4 * BYTES;
        block(row);
    }

    /// Rows that an output row reads.
    int64_t reach() const { return (step.kernel[0] - 1) * step.dilation[0] + 1; }

    Rows reached(int64_t row) const {
        return flat ? Rows{0, 1} : reached_rows(step, row);
    }

    /// Which of some pixels of a row reads nothing but the border at a tap of the kernel's row.
    Edge edge(int64_t tap, int64_t first, int64_t last) const {
        const int64_t own = tap * step.dilation[1] - step.padding[1];
        return first * step.stride[1] + own < 0 ? FIRST : last * step.stride[1] + own >= step.width ? LAST : WITHIN;
    }

    int64_t best_pixels() const { return std::min(7, most_pixels(tiles[0].vectors)); }

    /// Tiles that share their slice and have work enough for a chunk.
    void block(int64_t row) {
        double work = 0;
        for (size_t i = 0; i < tiles.size(); i++) {
            const bool other = i && tiles[i].slice != tiles[i - 1].slice;
            if (!i || (work >= chunk / 2 && (other || step.groups == 1))) blocks.push_back(int(i)), work = 0;
            work += waits * double(band * row) * taps * per_group * tiles[i].count();
        }
        blocks.push_back(int(tiles.size()));
    }

    /// Rows of input that a panel has at a time: one takes the place of that so many before.
    int64_t panel_rows() const { return (band - 1) * step.stride[0] + reach(); }

    int64_t chunks() const { return images * bands * int64_t(blocks.size() - 1); }

    Chunk place(int64_t number) const {
        const int64_t some = int64_t(blocks.size()) - 1, image = number / (bands * some), own = number % (bands * some);
        return bands_first ? Chunk{image, own % bands, own / bands} : Chunk{image, own / some, own % some};
    }
};

}  // namespace

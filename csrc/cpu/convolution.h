// A convolution as a step of a program: which kernels compute which output channels, how the work is cut into chunks,
// how input is brought into place for them, and how weights are laid out.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace {

enum Kind { CONV, MEANS, AFFINE, LARGEST, AVERAGE };

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
    int64_t winograd;  // how the weights are laid out
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
constexpr int64_t FEW_PIXELS = 28;     // that a weight is read for, at least
constexpr int64_t SLICE = 48;          // channels that are brought into place together, at least

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
    double few;                      // by how much more one takes that waits for its weight
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

    void tile() {
        const int64_t groups = step.groups, out = step.out_channels / groups;
        taps = step.kernel[0] * step.kernel[1];
        per_group = step.channels / groups;
        units = std::max<int64_t>(1, divided(per_group, per_unit()));
        together = groups == 1 || out % LANES == 0 ? 1 : out < LANES ? LANES / out : 2;
        int64_t weight = 0;
        for (int64_t g = 0; g < groups; g += together) {
            const int64_t there = std::min(together, groups - g), turns = together == 2 ? there : together;
            const int64_t lanes = LANES / turns, vectors = divided(out, lanes), calls = divided(vectors, MOST_VECTORS);
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
        const int64_t few = std::max<int64_t>(1, SLICE / (together * per_group)) * together;
        const int64_t size = step.groups == 1 ? 1 : few;
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
        few = std::max(1.0, FEW_FOR_A_WEIGHT / double(row * rows));
        const double work = few * double(row * rows) * step.out_channels * taps * per_group;  // none of a batch
        chunk = std::min(std::max(work / CHUNKS, LEAST_CHUNK), CHUNK);
        bands_first = !whole || (direct && step.out_channels * units > pixels * pitch);
        int64_t most = std::max<int64_t>(1, int64_t(chunk / tile_work));
        if (whole) most = std::max(most, divided(FEW_PIXELS, row));
        const int64_t bytes = panel_width * pitch * 4;
        const int64_t fit = flat ? PANEL / bytes : (PANEL / bytes - reach()) / step.stride[0] + 1;
        most = std::max(std::min(most, fit), whole ? divided(FEW_PIXELS, row) : int64_t(1));
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

    /// The kernel's rows that read the image, and not its padding, for an output row.
    Rows reached(int64_t row) const {
        if (flat) return {0, 1};
        const int64_t top = row * step.stride[0] - step.padding[0], down = step.dilation[0];
        const int64_t above = top < 0 ? divided(-top, down) : 0;
        const int64_t within = top < step.height ? divided(step.height - top, down) : 0;
        const int64_t begin = std::min(above, step.kernel[0]), end = std::min(within, step.kernel[0]);
        return {begin, std::max<int64_t>(0, end - begin)};
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
            work += few * double(band * row) * taps * per_group * tiles[i].count();
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

/// What a thread holds: the input of some rows, or pixels, brought into place.
struct Scratch {
    char* panel;
    int64_t step = -1, image = -1, slice = -1, begin = 0, end = 0;
};

/// A pixel's channels as they are read, and as the arithmetic takes them.
template <typename A, typename T>
struct Reader {
    using Stored = std::conditional_t<A::PER_UNIT == 1, float, Bf16>;

    const Conv& conv;
    const float *gate, *scale, *shift;
    int64_t channels, pitch, plane;
    bool turned, as_it_is;
    Stored* spare;
    Words turn;
    HalfWords half_turn;

    Reader(const Conv& conv, void* const* buffers, int64_t image, const Channels& tile, char* panel) : conv(conv) {
        const Step& s = conv.step;
        gate = s.gate < 0 ? nullptr : static_cast<const float*>(buffers[s.gate]) + image * s.channels + tile.slice;
        scale = s.scale ? s.scale + tile.slice : nullptr;
        shift = s.scale ? s.shift + tile.slice : nullptr;
        channels = tile.slice_channels, pitch = conv.pitch * A::PER_UNIT;
        plane = s.planar ? s.height * s.width : 1;
        turned = conv.turned(), spare = reinterpret_cast<Stored*>(panel + conv.spare);
        as_it_is = std::is_same<T, Stored>::value && !gate && !scale && plane == 1;
        turn = in_turn<Words>(int(conv.together)), half_turn = in_turn<HalfWords>(int(conv.together));
    }

    /// Some pixels of a row, `step` numbers after each other.
    void put_row(const T* x, int64_t step, int64_t pixels, Stored* out) const {
        if (as_it_is && !turned && step == channels && step == pitch) {
            std::memcpy(static_cast<void*>(out), x, pixels * channels * sizeof(T));
        } else if (plane == 1 || turned) {
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
        if (turned) {
            if (!as_it_is) read(x, spare);
            bring_in_turn(as_it_is ? reinterpret_cast<const Stored*>(x) : spare, out);
        } else {
            read(x, out);
            if (channels < pitch) std::memset(static_cast<void*>(out + channels), 0, (pitch - channels) * sizeof(Stored));
        }
    }

    ALWAYS void read(const T* x, Stored* out) const {
        if (as_it_is) {
            std::memcpy(static_cast<void*>(out), x, channels * sizeof(T));
        } else if (plane != 1) {
            for (int64_t c = 0; c < channels; c++) out[c] = converted(x[c * plane]);
        } else {
            for (int64_t c = 0; c < channels; c += LANES) {
                const int count = int(std::min<int64_t>(LANES, channels - c));
                Vec z = load(x + c, count);
                if (gate) z *= load(gate + c, count);
                if (scale) z = activate(z * load(scale + c, count) + load(shift + c, count), int(conv.step.before));
                store(out + c, z, count);
            }
        }
    }

    /// Of so many groups as take turns in a vector, a unit of each after the other.
    ALWAYS void bring_in_turn(const Stored* x, Stored* out) const {
        const int64_t units = conv.units, some = conv.together, width = conv.per_group, size = some * units;
        if (width < A::PER_UNIT) {
            std::memset(static_cast<void*>(out), 0, pitch * sizeof(Stored));
            for (int64_t c = 0; c < channels; c++) out[c * A::PER_UNIT] = x[c];
            return;
        }
        const auto* from = reinterpret_cast<const uint32_t*>(x);
        auto* to = reinterpret_cast<uint32_t*>(out);
        for (int64_t left = channels / width; left > 0; left -= some, from += size, to += size) {
            if (some == 2 && left == 1) {
                std::memcpy(to, from, units * 4);
            } else if (some == 2 && units % 4 == 0) {
                two_in_turn(from, from + units, units, to);
            } else if (size == LANES && left >= some) {
                *reinterpret_cast<LooseWords*>(to) = picked(Words(*reinterpret_cast<const LooseWords*>(from)), turn);
            } else if (size == LANES / 2 && left >= some) {
                const HalfWords own = *reinterpret_cast<const LooseHalfWords*>(from);
                *reinterpret_cast<LooseHalfWords*>(to) = picked(own, half_turn);
            } else {  // lanes of a group that is missing are not stored
                for (int64_t u = 0; u < units; u++)
                    for (int64_t g = 0; g < some; g++)
                        std::memcpy(to + u * some + g, from + std::min(g, left - 1) * units + u, 4);
            }
        }
    }
};

/// Bring into place some pixels, or rows with their border, of the channels of a tile.
template <typename A, typename T>
__attribute__((noinline)) void fill(const Conv& conv, void* const* buffers, int64_t image, int64_t begin, int64_t end,
                                    const Channels& tile, char* panel) {
    using Stored = typename Reader<A, T>::Stored;
    const Step& s = conv.step;
    const Reader<A, T> reader(conv, buffers, image, tile, panel);
    const T* x = static_cast<const T*>(buffers[s.x]) + image * s.channels * s.height * s.width +
                 (s.planar ? 0 : tile.slice);
    const int64_t step = s.planar ? 1 : s.channels;
    Stored* out = reinterpret_cast<Stored*>(panel);
    if (conv.flat) {
        for (int64_t p = begin; p < end; p++, out += reader.pitch) {
            const int64_t row = p / s.out_width * s.stride[0], column = p % s.out_width * s.stride[1];
            reader.put_row(x + (row * s.width + column) * step, step, 1, out);
        }
        return;
    }
    const int64_t left = std::min(s.padding[1], conv.panel_width), slots = conv.panel_rows();
    const int64_t inside = std::max<int64_t>(0, std::min(conv.panel_width - left, s.width));
    const int64_t right = conv.panel_width - left - inside;
    for (int64_t r = begin; r < end; r++) {
        const int64_t row = r - s.padding[0];
        if (row < 0 || row >= s.height) continue;  // no kernel's row reads it
        Stored* to = out + r % slots * conv.panel_width * reader.pitch;
        std::memset(static_cast<void*>(to), 0, left * reader.pitch * sizeof(Stored));
        to += left * reader.pitch;
        reader.put_row(x + row * s.width * step, step, inside, to);
        std::memset(static_cast<void*>(to + inside * reader.pitch), 0, right * reader.pitch * sizeof(Stored));
    }
}

/// Bring into place what is not there yet. Rows that the band before has read as well are.
template <typename A, typename T>
void bring(const Conv& conv, int64_t number, void* const* buffers, const Chunk& chunk, int64_t rows, int64_t row,
           const Channels& tile, Scratch& scratch) {
    const int64_t first = chunk.band * conv.band, down = conv.step.stride[0];
    const int64_t begin = conv.flat ? first : first * down;
    const int64_t end = conv.flat ? first + row : (first + rows - 1) * down + conv.reach();
    const bool same = scratch.step == number && scratch.image == chunk.image && scratch.slice == tile.slice;
    if (same && scratch.begin == begin && scratch.end == end) return;
    const bool more = same && !conv.flat && scratch.begin <= begin && begin <= scratch.end && scratch.end <= end;
    fill<A, T>(conv, buffers, chunk.image, more ? scratch.end : begin, end, tile, scratch.panel);
    scratch.step = number, scratch.image = chunk.image, scratch.slice = tile.slice;
    scratch.begin = begin, scratch.end = end;
}

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
    tile.units = int(conv.units * merged);
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
        const int64_t pieces = divided(row, kernels.most);
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

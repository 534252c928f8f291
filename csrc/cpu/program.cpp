// Networks in evaluation on a CPU: a program of steps over maps in channels_last, run in one parallel region.
//
// The work of a step is cut into chunks, each thread has a range of them and takes from the others when its own is
// done. A step begins when all chunks of the one before are done, whoever did them, so that a thread that the system
// put aside holds up nothing but a chunk that it has begun. No result depends on the number of threads.
//
// Maps are float32 or bfloat16, sums are float32. Compiled and loaded by regnet_fast/backends/cpu_library.py, and
// called by regnet_fast/backends/native.py.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include <omp.h>
#include <pthread.h>
#include <sched.h>

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
constexpr int64_t MAP_CHUNK = 1 << 14;
constexpr int SPINS = 2000;

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

/// y[n][c] = the sum over bands of x[n][band][c], divided by the number of pixels.
void means_chunk(const Step& s, void* const* buffers, int64_t image) {
    const float* x = static_cast<const float*>(buffers[s.x]) + image * s.height * s.channels;
    float* y = static_cast<float*>(buffers[s.y]) + image * s.channels;
    for (int64_t c = 0; c < s.channels; c += LANES) {
        const int count = int(std::min<int64_t>(LANES, s.channels - c));
        Vec total = {};
        for (int64_t b = 0; b < s.height; b++) total += load(x + b * s.channels + c, count);
        store(y + c, total * (1.0f / float(s.width)), count);
    }
}

/// y = activation(x * gate * scale + shift).
template <typename T>
void affine_chunk(const Step& s, void* const* buffers, int64_t chunk, int64_t bands, int64_t band) {
    const int64_t image = chunk / bands, first = chunk % bands * band, pixels = s.height * s.width;
    const float* gate = s.gate < 0 ? nullptr : static_cast<const float*>(buffers[s.gate]) + image * s.channels;
    const int64_t end = std::min(first + band, pixels);
    for (int64_t p = first; p < end; p++) {
        const int64_t at = (image * pixels + p) * s.channels;
        const T* x = static_cast<const T*>(buffers[s.x]) + at;
        T* y = static_cast<T*>(buffers[s.y]) + at;
        for (int64_t c = 0; c < s.channels; c += LANES) {
            const int count = int(std::min<int64_t>(LANES, s.channels - c));
            Vec z = load(x + c, count);
            if (gate) z *= load(gate + c, count);
            z = z * load(s.scale + c, count) + load(s.shift + c, count);
            store(y + c, activate(z, int(s.activation)), count);
        }
    }
}

struct Work {
    Step step;
    std::unique_ptr<Conv> conv;
    int64_t chunks = 0, bands = 1, band = 0;

    explicit Work(const Step& given) : step(given) {
        if (step.kind == CONV) {
            conv.reset(new Conv(step));
            chunks = conv->chunks();
        } else if (step.kind == MEANS) {
            chunks = step.images;
        } else {
            const int64_t pixels = step.height * step.width;
            band = std::min(pixels, divided(MAP_CHUNK, step.channels));
            bands = divided(pixels, band);
            chunks = step.images * bands;
        }
    }

    void run(int64_t number, void* const* buffers, int64_t chunk, Scratch& scratch) const {
        if (step.kind == MEANS) {
            means_chunk(step, buffers, chunk);
        } else if (step.kind == AFFINE) {
            step.bfloat16 ? affine_chunk<Bf16>(step, buffers, chunk, bands, band)
                          : affine_chunk<float>(step, buffers, chunk, bands, band);
        } else if (step.bfloat16) {
            conv_chunk<Pairs, Bf16>(*conv, number, buffers, chunk, scratch);
        } else {
            conv_chunk<Singles, float>(*conv, number, buffers, chunk, scratch);
        }
    }
};

struct Program {
    std::vector<Work> steps;
    int64_t scratch = 0;
};

/// How far a step is: the chunks of each thread's range that were begun, and how many of all are done.
struct alignas(64) Begun {
    std::atomic<int64_t> next{0};
};

struct alignas(64) Done {
    std::atomic<int64_t> count{0};
};

void wait_for(const Done& done, int64_t chunks) {
    for (int spins = 0; done.count.load(std::memory_order_acquire) < chunks; spins++) {
        if (spins < SPINS) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        } else {
            sched_yield();
        }
    }
}

void run_steps(const Program& program, void* const* buffers, char* memory, int thread, int threads, Begun* begun,
               Done* done) {
    Scratch scratch{memory + thread * program.scratch};
    for (size_t i = 0; i < program.steps.size(); i++) {
        const Work& work = program.steps[i];
        for (int other = 0; other < threads; other++) {
            const int owner = (thread + other) % threads;
            const int64_t end = work.chunks * (owner + 1) / threads, start = work.chunks * owner / threads;
            Begun& own = begun[i * threads + owner];
            while (own.next.load(std::memory_order_relaxed) < end - start) {
                const int64_t chunk = start + own.next.fetch_add(1, std::memory_order_relaxed);
                if (chunk >= end) break;
                work.run(int64_t(i), buffers, chunk, scratch);
                done[i].count.fetch_add(1, std::memory_order_release);
            }
        }
        wait_for(done[i], work.chunks);
    }
}

/// Whether this process was forked from one whose threads had run a program: they are not here, and would be waited for.
bool alone_after_fork() {
    static std::atomic<bool> forked{false};
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return registered != 0 || forked;
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

extern "C" {

/// The lanes of a vector.
int64_t lanes() { return LANES; }

/// Bytes of a convolution's weights as they are laid out.
int64_t packed_size(const Step* step) {
    const Conv conv(*step);
    int64_t size = 0;
    for (const Channels& tile : conv.tiles) size += conv.taps * conv.units * tile.vectors * LANES * 4;
    return size;
}

/// Lay out the weights of a convolution, given as (K, C / groups, R, S) in float32.
void pack_weight(const Step* step, const float* weight, void* packed, int threads) {
    const Conv conv(*step);
    if (alone_after_fork()) threads = 1;
    step->bfloat16 ? pack<Pairs>(conv, weight, packed, threads) : pack<Singles>(conv, weight, packed, threads);
}

/// Into how many sums for each image and channel a convolution adds its results.
int64_t bands_of(const Step* step) { return Conv(*step).bands; }

/// A program of steps, or null where there is no memory for it.
void* new_program(const Step* steps, int64_t count) {
    try {
        std::unique_ptr<Program> made(new Program);
        for (int64_t i = 0; i < count; i++) {
            made->steps.emplace_back(steps[i]);
            const Work& work = made->steps.back();
            if (work.conv) made->scratch = std::max(made->scratch, divided(work.conv->panel, 4096) * 4096);
        }
        return made.release();
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void free_program(void* program) { delete static_cast<Program*>(program); }

/// Bytes that each thread needs beside the buffers.
int64_t scratch_size(const void* program) { return static_cast<const Program*>(program)->scratch; }

/// Run a program over its buffers, with scratch memory of `scratch_size` bytes for each thread.
void run_program(const void* given, void* const* buffers, void* scratch, int threads) {
    const Program& program = *static_cast<const Program*>(given);
    const size_t count = program.steps.size();
    std::unique_ptr<Begun[]> begun(new Begun[count * threads]);
    std::unique_ptr<Done[]> done(new Done[count]);
    char* memory = static_cast<char*>(scratch);
    if (threads == 1 || alone_after_fork()) return run_steps(program, buffers, memory, 0, 1, begun.get(), done.get());
#pragma omp parallel num_threads(threads)
    run_steps(program, buffers, memory, omp_get_thread_num(), threads, begun.get(), done.get());
}

}  // extern "C"

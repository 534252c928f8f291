// How input is brought into place for the kernels of a convolution: a band of rows with its border, with the gate or the
// norm computed on the way, and groups that take turns in turn.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "plan.h"

namespace {

/// Weights of the step behind this one that are yet to be brought into the second cache.
struct Asked {
    const char *next, *end;

    ALWAYS void two_lines() {
        if (next >= end) return;
        __builtin_prefetch(next, 0, 2), __builtin_prefetch(next + 64, 0, 2);
        next += 128;
    }
};

/// What a thread holds: the input of some rows, or pixels, brought into place.
struct Scratch {
    char* panel;
    int64_t step = -1, image = -1, slice = -1, begin = 0, end = 0;
    Asked asked = {};
};

/// Some channels of a pixel as they are read: x * gate * scale + shift with the activation before, as a Stored.
template <typename T, typename Stored>
struct Prologue {
    const float *gate, *scale, *shift;
    int64_t channels, plane;  // numbers from a channel to the next one, in an image in NCHW
    int before;
    bool as_it_is;

    Prologue(const Step& s, void* const* buffers, int64_t image, int64_t first, int64_t channels) : channels(channels) {
        gate = s.gate < 0 ? nullptr : static_cast<const float*>(buffers[s.gate]) + image * s.channels + first;
        scale = s.scale ? s.scale + first : nullptr;
        shift = s.scale ? s.shift + first : nullptr;
        plane = s.planar ? s.height * s.width : 1, before = int(s.before);
        as_it_is = std::is_same<T, Stored>::value && !gate && !scale && plane == 1;
    }

    static ALWAYS Stored converted(Stored value) { return value; }

    template <typename S>
    static ALWAYS std::enable_if_t<!std::is_same<S, Stored>::value, Stored> converted(S value) {
        Stored made;
        store(&made, load(&value, 1), 1);
        return made;
    }

    ALWAYS void read(const T* x, Stored* out) const {
        if (as_it_is) {
            std::memcpy(static_cast<void*>(out), x, channels * sizeof(T));
        } else if (plane != 1) {
            for (int64_t c = 0; c < channels; c++) out[c] = converted(x[c * plane]);
        } else if (scale) {
            with_activation(before, [&](auto known) {
                each_vector(x, out, [&](Vec z, int64_t c, int count) {
                    if (gate) z *= load(gate + c, count);
                    z = z * load(scale + c, count) + load(shift + c, count);
                    return activate<T>(z, decltype(known)::value);
                });
            });
        } else if (gate) {
            each_vector(x, out, [&](Vec z, int64_t c, int count) { return z * load(gate + c, count); });
        } else {
            each_vector(x, out, [](Vec z, int64_t, int) { return z; });
        }
    }

    template <typename Made>
    ALWAYS void each_vector(const T* x, Stored* out, Made made) const {
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES) store(out + c, made(load(x + c), c, LANES));
        const int count = int(channels - c);
        if (count > 0) store(out + c, made(load(x + c, count), c, count), count);
    }

    /// Some pixels, `step` numbers after each other, each with zeros behind its channels up to `pitch`.
    void read_row(const T* x, int64_t step, int64_t pixels, Stored* out, int64_t pitch) const {
        if (as_it_is && step == channels && step == pitch) {
            std::memcpy(static_cast<void*>(out), x, pixels * channels * sizeof(T));
        } else if (plane == 1) {
            for (int64_t p = 0; p < pixels; p++, x += step, out += pitch) {
                read(x, out);
                if (channels < pitch)
                    std::memset(static_cast<void*>(out + channels), 0, (pitch - channels) * sizeof(Stored));
            }
        } else {
            int64_t done = 0;
            if (sizeof(T) == 2 && sizeof(Stored) == 2 && step == 1 && pitch == 4 && channels == 3) {
                for (; done + LANES <= pixels; done += LANES) in_fours(x + done, plane, out + done * pitch);
            }
            for (int64_t c = 0; c < pitch; c++)
                for (int64_t p = done; p < pixels; p++)
                    out[p * pitch + c] = c < channels ? converted(x[c * plane + p * step]) : Stored{};
        }
    }

    /// A vector of pixels of three channels, each with a zero behind them.
    static ALWAYS void in_fours(const T* x, int64_t plane, Stored* out) {
        Words some[3];
        for (int c = 0; c < 3; c++)
            some[c] = __builtin_convertvector(Halves(*reinterpret_cast<const LooseHalves*>(x + c * plane)), Words);
        const Words pair = some[0] | some[1] << 16;
        two_in_turn(pair, some[2], reinterpret_cast<uint32_t*>(out));
    }
};

/// A pixel's channels as the arithmetic takes them.
template <typename A, typename T>
struct Reader : Prologue<T, std::conditional_t<A::PER_UNIT == 1, float, Bf16>> {
    using Stored = std::conditional_t<A::PER_UNIT == 1, float, Bf16>;
    using Prologue<T, Stored>::as_it_is;
    using Prologue<T, Stored>::channels;

    const Conv& conv;
    int64_t pitch;
    Stored* spare;
    Words turn;
    HalfWords half_turn;

    Reader(const Conv& conv, void* const* buffers, int64_t image, const Channels& tile, char* panel)
        : Prologue<T, Stored>(conv.step, buffers, image, tile.slice, tile.slice_channels), conv(conv) {
        pitch = conv.pitch * A::PER_UNIT, spare = reinterpret_cast<Stored*>(panel + conv.spare);
        turn = in_turn<Words>(int(conv.together)), half_turn = in_turn<HalfWords>(int(conv.together));
    }

    /// Some pixels of a row, `step` numbers after each other.
    void put_row(const T* x, int64_t step, int64_t pixels, Stored* out) const {
        if (!conv.turned()) return this->read_row(x, step, pixels, out, pitch);
        for (int64_t p = 0; p < pixels; p++, x += step, out += pitch) {
            if (!as_it_is) this->read(x, spare);
            bring_in_turn(as_it_is ? reinterpret_cast<const Stored*>(x) : spare, out);
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

}  // namespace

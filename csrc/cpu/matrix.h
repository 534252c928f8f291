// A convolution in bfloat16 by the matrix unit (AMX): two registers of positions times two of output channels at a time.
//
// y[p][k] = activation(bias[k] + residual[p][k] + sum over terms of x[p + read] w[term][k]), as matrix_plan.h says.

#pragma once

#include "matrix_plan.h"
#include "panel.h"

namespace {

/// Copy some pixels of N channels.
template <int N>
ALWAYS void copy_pixels(const Bf16* x, int64_t step, int64_t pixels, Bf16* out) {
    for (int64_t p = 0; p < pixels; p++, x += step, out += N) std::memcpy(static_cast<void*>(out), x, 2 * N);
}

/// Copy some pixels of a group, each with zeros behind its channels up to `pitch`.
inline void copy_pixels(const Bf16* x, int64_t step, int64_t pixels, int64_t channels, Bf16* out, int64_t pitch) {
    if (channels == pitch && step == pitch) {
        std::memcpy(static_cast<void*>(out), x, 2 * pixels * pitch);
        return;
    }
    if (channels == pitch && pitch == 8) return copy_pixels<8>(x, step, pixels, out);
    if (channels == pitch && pitch == 16) return copy_pixels<16>(x, step, pixels, out);
    if (channels == pitch && pitch == 32) return copy_pixels<32>(x, step, pixels, out);
    if (channels == pitch && pitch == 64) return copy_pixels<64>(x, step, pixels, out);
    const int64_t whole = (channels - 1) / 32 * 32;  // and up to 32 more
#if defined(__AVX512BW__)
    const __mmask32 some = ~__mmask32(0) >> (32 - (channels - whole));
    const int64_t left = std::min<int64_t>(32, pitch - whole);
    for (int64_t p = 0; p < pixels; p++, x += step, out += pitch) {
        for (int64_t c = 0; c < whole; c += 32) _mm512_storeu_si512(out + c, _mm512_loadu_si512(x + c));
        _mm512_mask_storeu_epi16(out + whole, ~__mmask32(0) >> (32 - left), _mm512_maskz_loadu_epi16(some, x + whole));
        for (int64_t c = whole + left; c < pitch; c++) out[c] = {};
    }
#else
    for (int64_t p = 0; p < pixels; p++, x += step, out += pitch) {
        std::memcpy(static_cast<void*>(out), x, 2 * channels);
        std::memset(static_cast<void*>(out + channels), 0, 2 * (pitch - channels));
    }
#endif
}

/// Bring into place the pixels, or the rows with their border, that a chunk reads.
__attribute__((noinline)) inline void fill(const Matrix& m, void* const* buffers, const Chunk& chunk, char* panel) {
    const Step& s = m.step;
    const int64_t groups = m.groups(chunk), width = m.per_group, slice = m.first_group(chunk) * width;
    const Prologue<Bf16, Bf16> prologue(s, buffers, chunk.image, slice, groups * width);
    const Bf16* x = static_cast<const Bf16*>(buffers[s.x]) + chunk.image * s.channels * s.height * s.width + slice;
    const int64_t step = s.planar ? 1 : s.channels, first = m.start(chunk.band), end = m.start(chunk.band + 1);
    Bf16* out = reinterpret_cast<Bf16*>(panel);
    const int64_t apart = m.group_panel();
    Bf16* spare = out + groups * apart;
    const auto put = [&](const Bf16* from, int64_t next, int64_t pixels, Bf16* to) {
        if (!prologue.as_it_is) {
            if (groups == 1) return prologue.read_row(from, next, pixels, to, m.pitch);
            prologue.read_row(from, next, pixels, spare, groups * width);
            from = spare, next = groups * width;
        }
        for (int64_t g = 0; g < groups; g++) copy_pixels(from + g * width, next, pixels, width, to + g * apart, m.pitch);
    };
    const auto zero = [&](Bf16* to, int64_t pixels) {
        for (int64_t g = 0; g < groups; g++) std::memset(static_cast<void*>(to + g * apart), 0, 2 * pixels * m.pitch);
    };
    if (m.flat && m.running && prologue.as_it_is) return put(x + first * step, step, end - first, out);
    for (int64_t p = first; m.flat && p < end;) {  // rows of all images that are one
        const int64_t row = p / s.out_width, column = p % s.out_width, some = std::min(s.out_width - column, end - p);
        const int64_t top = row / s.out_height * s.height + row % s.out_height * s.stride[0];
        put(x + (top * s.width + column * s.stride[1]) * step, step * s.stride[1], some, out);
        p += some, out += some * m.pitch;
    }
    if (m.flat) return;
    const int64_t top = first * s.stride[0] - s.padding[0], rows = m.read_rows(end - first), every = m.phases[1];
    for (int64_t row = 0; row < rows; row++)
        for (int64_t phase = 0; phase < every; phase++) {
            const bool there = top + row >= 0 && top + row < s.height;
            const int64_t before = std::max<int64_t>(0, divided(s.padding[1] - phase, every));
            const int64_t begin = there ? std::min(before, m.panel_width) : m.panel_width;
            const int64_t column = phase + begin * every - s.padding[1];
            const int64_t inside = std::max<int64_t>(0, std::min(m.panel_width - begin, divided(s.width - column, every)));
            Bf16* to = out + m.place(row, phase) * m.pitch;
            zero(to, begin);
            put(x + ((top + row) * s.width + column) * step, step * every, inside, to + begin * m.pitch);
            zero(to + (begin + inside) * m.pitch, m.panel_width - begin - inside);
        }
}

#if defined(AMX_UNIT) || defined(AMX_EMULATED)

/// The sums of two registers of positions at most, that wait for what follows them.
struct Waiting {
    struct Positions {
        int64_t left, column;  // that are to be finished; in its period
        const float* sums;
        Bf16* y;
        const Bf16* residual;  // laid out as y, or null
    };

    Positions positions[2];
    int count;          // of registers
    int channels, row;  // that are there; sums of a position
    int64_t period, width, pitch;
    int64_t ahead;  // from a result to what is brought into the second cache when it is written
    Asked* asked;
    const float* bias;
    float* total;  // that the results are added to by channels, or null
    using Some = void (*)(Waiting&, Positions&, int64_t);
    Some some;  // finishes some of a register's

    ALWAYS void finish(int64_t most) {
        for (int i = 0; i < count; i++) {
            const int64_t now = std::min(most, positions[i].left);
            if (now > 0) some(*this, positions[i], now), most -= now;
        }
    }
};

/// y = activation(sums + bias + residual) of some pixels, all channels of which are there or not.
template <int ACTIVATION, bool ADDED, bool TOTAL, int VECTORS, bool WHOLE>
ALWAYS void finish_pixels(const Waiting& w, Waiting::Positions& p, int64_t count, const int (&own)[VECTORS],
                          const Vec (&bias)[VECTORS], Vec (&totals)[VECTORS]) {
    const int64_t row = w.row, pitch = w.pitch;
    const float* sums = p.sums;
    const Bf16* residual = p.residual;
    Bf16* y = p.y;
    for (int64_t k = 0; k < count; k++, sums += row, y += pitch) {
        asm("" : "+r"(y));  // an address of its own, which is faster than one made of that of the residual
        Vec z[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) {
            z[j] = bias[j] + load(sums + j * LANES);
            if (ADDED) z[j] += WHOLE ? load(residual + j * LANES) : load(residual + j * LANES, own[j]);
            z[j] = activate<Bf16>(z[j], ACTIVATION);
            if (TOTAL) totals[j] += z[j];
            if (WHOLE && j % 2) store(y + (j - 1) * LANES, z[j - 1], z[j]);
            else if (!WHOLE || VECTORS == 1) store(y + j * LANES, z[j], own[j]);
        }
        __builtin_prefetch(y + w.ahead, 0, 2);
        if (ADDED) residual += pitch;
    }
    p.y = y, p.residual = residual;
}

/// The same of some positions, of which those on the border are left out.
template <int ACTIVATION, bool ADDED, bool TOTAL, int VECTORS>
__attribute__((noinline)) void finish_positions(Waiting& w, Waiting::Positions& p, int64_t count) {
    int own[VECTORS];
    Vec bias[VECTORS], totals[VECTORS];  // pixel after pixel, however many there are in a call
    for (int j = 0; j < VECTORS; j++) {
        own[j] = std::min(std::max(w.channels - j * LANES, 0), LANES);
        bias[j] = load(w.bias + j * LANES);
        if (TOTAL) totals[j] = load(w.total + j * LANES, own[j]);
    }
    p.left -= count;
    while (count > 0) {
        const bool pixels = p.column < w.width, whole = own[VECTORS - 1] == LANES;
        const int64_t some = std::min(count, (pixels ? w.width : w.period) - p.column);
        if (pixels && whole) finish_pixels<ACTIVATION, ADDED, TOTAL, VECTORS, true>(w, p, some, own, bias, totals);
        if (pixels && !whole) finish_pixels<ACTIVATION, ADDED, TOTAL, VECTORS, false>(w, p, some, own, bias, totals);
        p.sums += some * w.row, p.column += some, count -= some;
        if (p.column == w.period) p.column = 0;
    }
    for (int j = 0; TOTAL && j < VECTORS; j++) store(w.total + j * LANES, totals[j], own[j]);
}

template <int ACTIVATION, int VECTORS>
Waiting::Some finishing(bool added, bool total) {
    if (added) return total ? finish_positions<ACTIVATION, true, true, VECTORS>
                            : finish_positions<ACTIVATION, true, false, VECTORS>;
    return total ? finish_positions<ACTIVATION, false, true, VECTORS>
                 : finish_positions<ACTIVATION, false, false, VECTORS>;
}

/// sums[m][p][k] = the sum over all terms, of M registers of positions and N of output channels. What waits there is
/// finished before the sums are stored: while the unit computes, some for each segment, or at once.
template <int M, int N, bool AT_ONCE>
__attribute__((noinline)) void matrix_sums(const Matrix& m, const char* a, const char* b, const Bf16* weight, float* sums,
                                           Waiting& waiting) {
    constexpr int ROW = N * SIDE;
    const int64_t hop = m.hop(), size = m.depth * SIDE, some = divided(2 * SIDE, int64_t(m.reads.size()));
    if constexpr (AT_ONCE) waiting.finish(2 * SIDE);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (const int64_t at : m.reads) {
        tile_load<6>(weight, 4 * SIDE);
        tile_load<4>(a + at, hop);
        tile_product<0, 4, 6>();
        if constexpr (N == 2) tile_load<7>(weight + size, 4 * SIDE);
        if constexpr (N == 2) tile_product<1, 4, 7>();
        if constexpr (M == 2) tile_load<5>(b + at, hop);
        if constexpr (M == 2) tile_product<2, 5, 6>();
        if constexpr (M == 2 && N == 2) tile_product<3, 5, 7>();
        weight += N * size;
        waiting.asked->two_lines();
        if constexpr (!AT_ONCE) waiting.finish(some);
    }
    tile_store<0>(sums, 4 * ROW);
    if constexpr (N == 2) tile_store<1>(sums + SIDE, 4 * ROW);
    if constexpr (M == 2) tile_store<2>(sums + SIDE * ROW, 4 * ROW);
    if constexpr (M == 2 && N == 2) tile_store<3>(sums + SIDE * ROW + SIDE, 4 * ROW);
}

/// `matrix_sums` of so many registers.
inline auto sums_of(int positions, int channels, bool at_once) {
    static constexpr decltype(&matrix_sums<1, 1, false>) found[2][2][2] = {
        {{matrix_sums<1, 1, false>, matrix_sums<1, 1, true>}, {matrix_sums<1, 2, false>, matrix_sums<1, 2, true>}},
        {{matrix_sums<2, 1, false>, matrix_sums<2, 1, true>}, {matrix_sums<2, 2, false>, matrix_sums<2, 2, true>}}};
    return found[positions - 1][channels - 1][at_once];
}

/// Have a part of the weights of the next output channels brought near.
inline void announce(const Matrix& m, int64_t tile, int64_t part, int64_t parts) {
    const int64_t size = 2 * m.tile_size(), begin = (tile + 2) * m.tile_size();
    const int64_t end = std::min(begin + size * (part + 1) / parts, m.size());
    const Bf16* weight = static_cast<const Bf16*>(m.step.weight);
    for (int64_t i = begin + size * part / parts; i < end; i += 2 * SIDE) __builtin_prefetch(weight + i, 0, 2);
}

/// A group of a chunk, whose input is read from x: two registers of positions times two of output channels after each
/// other.
template <int ACTIVATION>
void matrix_group(const Matrix& m, const Chunk& chunk, const Lines& lines, int64_t group, const char* x,
                  const Tile& tile, Asked& asked) {
    alignas(64) float sums[2 * SIDE * 2 * SIDE];
    const Step& s = m.step;
    const int64_t begin = m.first_tile(chunk), end = m.end_tile(chunk), pieces = lines.count * lines.pieces;
    const int64_t rows = divided(pieces, 2), columns = divided(end - begin, 2);
    Waiting waiting = {};
    waiting.asked = &asked;
    waiting.period = lines.period, waiting.width = lines.width, waiting.pitch = s.out_channels;
    waiting.ahead = 2 * SIDE * s.out_channels;
    const bool at_once = (ACTIVATION == NONE || ACTIVATION == RELU) && m.near;
    Piece found[2], next = {};
    for (int64_t number = 0, row = 0, first = begin; number < rows * columns; number++) {
        const int64_t channel = group * m.out + first * SIDE;
        const int count = 2 * row + 1 < pieces ? 2 : 1;
        const bool two = first + 1 < end;
        const char* from[2] = {};
        if (m.weights_first() || first == begin)
            for (int i = 0; i < count; i++, next = lines.behind(next)) found[i] = next;
        for (int i = 0; i < count; i++) from[i] = x + found[i].line * lines.down + lines.at(found[i]) * m.hop();
        if (m.many) announce(m, first, row, rows);
        const Bf16* weight = static_cast<const Bf16*>(s.weight) + (group * m.tiles + first) * m.tile_size();
        sums_of(count, two ? 2 : 1, at_once)(m, from[0], from[1], weight, sums, waiting);
        waiting.count = count, waiting.row = two ? 2 * SIDE : SIDE;
        waiting.channels = int(std::min<int64_t>(waiting.row, m.out - first * SIDE));
        waiting.bias = s.bias + channel, waiting.total = tile.sums ? tile.sums + channel : nullptr;
        waiting.some = two ? finishing<ACTIVATION, 2 * SIDE / LANES>(tile.residual, tile.sums)
                           : finishing<ACTIVATION, SIDE / LANES>(tile.residual, tile.sums);
        for (int i = 0; i < waiting.count; i++) {
            const Piece& piece = found[i];
            const int64_t pixel = lines.pixel + piece.down * lines.width + std::min(piece.column, lines.width);
            const int64_t y = pixel * s.out_channels + channel;
            Waiting::Positions& p = waiting.positions[i];
            p.left = std::min(lines.side, lines.positions - piece.start), p.column = piece.column;
            p.sums = sums + (i * SIDE + piece.start - lines.at(piece)) * waiting.row;
            p.y = static_cast<Bf16*>(tile.y) + y;
            p.residual = tile.residual ? static_cast<const Bf16*>(tile.residual) + y : nullptr;
        }
        if (m.weights_first()) {
            if (++row == rows) row = 0, first += 2, next = {};
        } else if ((first += 2) >= end) {
            first = begin, row++;
        }
    }
    waiting.finish(2 * SIDE);
}

inline void matrix_chunk(const Matrix& m, int64_t number, void* const* buffers, int64_t order, Scratch& scratch) {
    const Step& s = m.step;
    const Chunk chunk = m.chunk(order);
    const int64_t group = m.first_group(chunk), groups = m.groups(chunk);
    const char* x = scratch.panel;
    if (m.direct) {
        const Bf16* map = static_cast<const Bf16*>(buffers[s.x]);
        x = reinterpret_cast<const char*>(map + (chunk.image * m.pixels + m.start(chunk.band)) * s.channels);
    } else {
        const bool same = scratch.step == number && scratch.image == chunk.image && scratch.slice == group &&
                          scratch.begin == chunk.band;
        if (!same) fill(m, buffers, chunk, scratch.panel);
        scratch.step = number, scratch.image = chunk.image, scratch.slice = group, scratch.begin = chunk.band;
    }
    Tile tile = {};
    tile.y = buffers[s.y], tile.residual = s.residual < 0 ? nullptr : buffers[s.residual];
    if (s.sums >= 0) {
        tile.sums = static_cast<float*>(buffers[s.sums]) + (chunk.image * m.bands + chunk.band) * s.out_channels;
        const int64_t begin = group * m.out + m.first_tile(chunk) * SIDE;
        const int64_t end = (group + groups - 1) * m.out + std::min(m.end_tile(chunk) * SIDE, m.out);
        std::fill(tile.sums + begin, tile.sums + end, 0.0f);
    }
    const Lines lines = m.lines(chunk);
    const Registers registers(Shapes(int(lines.side), int(m.depth)));
    with_activation(int(s.activation), [&](auto known) {
        for (int64_t g = 0; g < groups; g++)
            matrix_group<decltype(known)::value>(m, chunk, lines, group + g, x + g * 2 * m.group_panel(), tile,
                                                 scratch.asked);
    });
}

#else

inline void matrix_chunk(const Matrix&, int64_t, void* const*, int64_t, Scratch&) {}

#endif

/// Lay out the weights in the order in which `matrix_sums` reads them.
inline void pack_matrix(const Matrix& m, const float* weight, Bf16* packed, int threads) {
    const Step& s = m.step;
    const int64_t taps = s.kernel[0] * s.kernel[1], pairs = divided(m.tiles, 2);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t number = 0; number < s.groups * pairs; number++) {
        const int64_t group = number / pairs, first = number % pairs * 2, some = std::min<int64_t>(2, m.tiles - first);
        Bf16* to = packed + (group * m.tiles + first) * m.tile_size();
        for (const Segment& segment : m.segments)
            for (int64_t n = first * SIDE; n < (first + some) * SIDE; n += SIDE)
                for (int64_t i = 0; i < m.depth * SIDE; i++, to++) {
                    const int64_t k = n + i / 2 % SIDE, term = segment.term + i / (2 * SIDE) * 2 + i % 2;
                    const int64_t t = segment.row * s.kernel[1] + term / m.terms, c = term % m.terms;
                    const bool there = k < m.out && c < m.per_group;
                    put(to, there ? weight[((group * m.out + k) * m.per_group + c) * taps + t] : 0.0f);
                }
    }
}

}  // namespace

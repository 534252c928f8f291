// The plan of a convolution by the matrix unit: how a position's terms lie, in which segments they are read, and how the
// work is cut into chunks.
//
// A register of pixels is read where they lie, with the distance between them as its step. So its pixels are positions
// that follow each other at one distance: in rows that are brought into place with their border, all positions of a
// convolution without a stride do, from row to row; those on the border are computed, and left out in the end. With a
// stride they do where the rows and the columns of each phase, every second of two, are brought into place for
// themselves, or else the positions of one row do. What a row of the kernel reads of a position lies together where it is not dilated,
// so that the taps of narrow groups share registers. It is cut into equal segments of at most a register's row.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "amx.h"
#include "plan.h"

namespace {

// By what chunks are measured, in multiplications and additions of vectors: how many products of the unit take the time
// of one, and the time of a result, of a number that is brought into place and of a weight.
constexpr double UNIT_PRODUCTS = 16, RESULT = 12, BROUGHT = 4, WEIGHT = 4;

constexpr double SMALLEST_CHUNK = 1e5, LARGEST_CHUNK = 2e6;
constexpr int64_t SHARES = 2;         // of a step for each thread, at least, and
constexpr double SHARES_OF_SUMS = 8;  // of an image where results are summed by bands, for any number of threads
constexpr int64_t LEAST_POSITIONS = 64;      // of a band
constexpr int64_t LEAST_ROWS = 6;            // since those beside them are brought into place for a band as well
constexpr int64_t LEAST_WIDE = 32;           // channels of the groups that are brought into place together
constexpr int64_t CROWDED = 64;              // numbers from pixel to pixel, whose multiples share few sets of a cache
constexpr int64_t MOST_ASKED = 1 << 20;      // bytes of weights that are brought into the second cache ahead
constexpr int64_t PASSES = 5;                // of weights through a thread for them to be in the second cache mostly
constexpr double FEWER_REGISTERS = 1.25;     // by which they are far fewer
constexpr double MORE_SEGMENTS = 1.25;       // that are worth reading a map where it lies, or from where lines begin

/// Terms that are neighbours in a row of the kernel, from one on.
struct Segment {
    int64_t row, term;
};

/// A register of positions of a line.
struct Piece {
    int64_t line, start;   // its first position that counts
    int64_t down, column;  // where that one is: how many periods before it, and in its own
};

/// The positions of a chunk. Those of a line follow each other at one distance; of each period the first are pixels.
struct Lines {
    int64_t count, positions, period, width;
    int64_t side, pieces;  // positions of a register; registers of a line, of which the last may begin in the one before
    int64_t down;          // bytes from a line's input to the next one's
    int64_t pixel;         // the first one of the result

    /// The first position of a piece, from which on its register is read.
    int64_t at(const Piece& piece) const { return std::min(piece.start, positions - side); }

    Piece behind(Piece piece) const {
        piece.start += side, piece.column += side;
        if (piece.start >= positions) return {piece.line + 1, 0, piece.down + 1, 0};
        while (piece.column >= period) piece.column -= period, piece.down++;
        return piece;
    }
};

struct Matrix {
    Step step;
    int64_t per_group, out, tiles;       // channels of a group, its output channels and their registers
    int64_t terms;                       // numbers of a pixel of a group that are summed, at least its channels
    int64_t pitch;                       // from such a pixel to the next one, as they are read
    int64_t depth;                       // terms of a segment
    std::vector<Segment> segments;       // in the order in which they are summed
    std::vector<int64_t> reads;          // where each is read, in bytes from a position's first number
    bool flat, direct, running;          // 1x1; read where it lies; positions go on from row to row
    int64_t images, pixels;              // of each, where it is flat
    int64_t band, bands, block, blocks;  // rows or pixels of a chunk, at most; groups, or pairs of registers of channels
    bool many, near;                     // weights there are; they are where the unit hardly waits for them
    int64_t phases[2];                   // of rows and of columns, each brought into place for itself
    int64_t panel_width, panel;          // pixels of a row of a phase, bytes

    /// To be computed by so many threads, on which neither the layout of the weights nor the bands of sums depend.
    explicit Matrix(const Step& given, int threads = 1) : step(given) {
        per_group = step.channels / step.groups, out = step.out_channels / step.groups, tiles = divided(out, SIDE);
        flat = step.kernel[0] == 1 && step.kernel[1] == 1 && !step.padding[0] && !step.padding[1];
        lay(step.dilation[1] == 1 ? step.kernel[1] : 1);
        for (int i : {0, 1}) phases[i] = in_phases() ? step.stride[i] : 1;
        running = step.stride[0] == phases[0] && step.stride[1] == phases[1];
        panel_width = divided(read_columns(), phases[1]);
        const bool read = step.gate >= 0 || step.scale || step.planar;
        direct = flat && running && !read && !grouped() && pitch == step.channels;
        const bool by_image = read || step.sums >= 0 || !flat;  // else as one long image
        images = by_image ? step.images : 1;
        pixels = step.out_height * step.out_width * (by_image ? 1 : step.images);
        cut(threads);
        for (const Segment& one : segments) {
            const int64_t row = one.row * step.dilation[0], column = one.term / terms * step.dilation[1];
            reads.push_back(2 * (place(row, column) * pitch + one.term % terms));
        }
    }

    /// Whether rows and columns of each phase are brought into place for themselves: where that makes registers fewer by
    /// far, since it takes longer.
    bool in_phases() const {
        for (int i : {0, 1})
            if (step.dilation[i] != 1 || step.kernel[i] < step.stride[i]) return false;
        const int64_t rows = step.out_height, width = divided(read_columns(), step.stride[1]);
        const int64_t running = divided(rows * width, SIDE), of_rows = rows * divided(step.out_width, SIDE);
        return !flat && whole_taps() && double(of_rows) >= FEWER_REGISTERS * double(running);
    }

    /// Whether a segment is of one tap.
    bool whole_taps() const { return terms % depth == 0; }

    bool grouped() const { return step.groups > 1; }

    /// Whether weights stay in the first cache while positions pass, and not the other way round: positions come from the
    /// second cache as weights do, but from places that share its sets.
    bool weights_first() const { return grouped() || (many && !flat); }

    /// Of the pitches that make the fewest segments the smallest; in their place one by which pixels begin where lines
    /// do, or before it that of a map that can be read where it lies, where it costs few segments.
    void lay(int64_t merged) {
        const auto count = [&](int64_t width) { return equal_parts(merged * width); };
        const int64_t exact = per_group + per_group % 2, aligned = divided(exact, 2 * SIDE) * 2 * SIDE;
        int64_t best = exact;
        for (int64_t width = exact; width <= aligned; width += 2)
            if (count(width) < count(best)) best = width;
        const auto few = [&](int64_t width) { return double(count(width)) <= MORE_SEGMENTS * double(count(best)); };
        terms = flat && !grouped() && few(exact) ? exact : few(aligned) ? aligned : best;
        depth = merged * terms / count(terms), pitch = terms;
        for (int64_t term = 0; term < step.kernel[1] * terms; term += depth)
            for (int64_t row = 0; row < step.kernel[0]; row++) segments.push_back({row, term});
        if (whole_taps()) {  // what one tap reads is in the first cache when its neighbours read it
            std::stable_sort(segments.begin(), segments.end(),
                             [&](const Segment& a, const Segment& b) { return a.term % terms < b.term % terms; });
            if (!flat && terms > CROWDED && terms % CROWDED == 0) pitch += 2 * SIDE;  // a line
        }
    }

    /// Into how few equal parts of an even number of terms so many go, each of a register's row at most.
    static int64_t equal_parts(int64_t terms) {
        int64_t count = divided(terms, 2 * SIDE);
        while (terms / 2 % count) count++;
        return count;
    }

    /// Into chunks: into bands first, so that a thread finds in its own cache what it has computed in the step before.
    /// Many weights are cut instead, so that each is read by one thread, for all images.
    void cut(int threads) {
        const int64_t rows = band_rows(), row = flat ? 1 : step.out_width;
        const int64_t units = grouped() ? step.groups : divided(tiles, 2);
        const int64_t together = grouped() ? divided(LEAST_WIDE, per_group) : 1;
        const double products = double(step.kernel[0] * step.kernel[1] * per_group) / UNIT_PRODUCTS;
        const double read = direct ? 0 : BROUGHT * double(step.channels * step.stride[0] * step.stride[1]);
        const double work = double(rows * row) * ((products + RESULT) * double(step.out_channels) + read) +
                            WEIGHT * double(size());
        const double shares = step.sums >= 0 ? SHARES_OF_SUMS : double(SHARES * threads) / double(images);
        const double chunks = std::min(std::max(shares, work / LARGEST_CHUNK), work / SMALLEST_CHUNK);  // of an image
        const int64_t most = std::max<int64_t>(1, int64_t(chunks + 0.5));
        many = size() > MANY_WEIGHTS && !grouped();
        near = grouped() || (flat && !many && images * pixels >= PASSES * 2 * SIDE * threads);
        const int64_t least =
            flat ? LEAST_POSITIONS : std::max(step.kernel[0] > 1 ? LEAST_ROWS : 1, divided(2 * SIDE, row));
        const int64_t bytes = 2 * pitch * (grouped() ? together : 1) * (flat ? 1 : read_columns() * step.stride[0]);
        const int64_t fit = direct ? rows : std::max(least, (many ? 8 : 2) * PANEL / bytes), needed = divided(rows, fit);
        if (many) {
            bands = needed;
            blocks = std::min(units, images > 1 ? divided(size(), MANY_WEIGHTS) : most);
        } else {
            const int64_t fair = rows > grain() ? 2 : 1;
            bands = std::max(needed, std::min(std::max(fair, rows / least), most));
            if (bands > std::max<int64_t>(2, needed)) bands = std::max(needed, bands / 2 * 2);
            blocks = std::max<int64_t>(1, std::min(units / together, most / bands));
        }
        block = divided(units, blocks), blocks = divided(units, block), band = 0;
        for (int64_t i = 0; i < bands; i++) band = std::max(band, start(i + 1) - start(i));
        panel = direct ? 0 : 2 * (group_panel() * (grouped() ? block : 1) + spare()) + 4 * BYTES;
    }

    int64_t band_rows() const { return flat ? pixels : step.out_height; }

    /// Rows, or pixels, between which bands are not cut.
    int64_t grain() const { return flat ? 2 * SIDE : 1; }

    /// Where a band begins.
    int64_t start(int64_t number) const {
        return std::min(band_rows(), divided(band_rows(), grain()) * number / bands * grain());
    }

    Lines lines(const Chunk& chunk) const {
        const int64_t first = start(chunk.band), count = start(chunk.band + 1) - first;
        Lines found = {};
        found.count = flat || running ? 1 : count, found.width = flat ? count : step.out_width;
        found.period = !flat && running ? panel_width : found.width;
        found.positions = !flat && running ? (count - 1) * panel_width + found.width : found.width;
        found.side = std::min<int64_t>(SIDE, found.positions), found.pieces = divided(found.positions, found.side);
        found.down = 2 * pitch * panel_width * step.stride[0];
        found.pixel = flat ? chunk.image * pixels + first : (chunk.image * step.out_height + first) * step.out_width;
        return found;
    }

    /// Bytes from a position to the next one.
    int64_t hop() const { return 2 * pitch * (flat ? 1 : step.stride[1] / phases[1]); }

    /// Rows of input that some rows read.
    int64_t read_rows(int64_t count) const {
        return (count - 1) * step.stride[0] + (step.kernel[0] - 1) * step.dilation[0] + 1;
    }

    /// Columns of input that a row reads.
    int64_t read_columns() const {
        return (step.out_width - 1) * step.stride[1] + (step.kernel[1] - 1) * step.dilation[1] + 1;
    }

    /// Rows of a phase in a panel.
    int64_t phase_rows() const { return divided(read_rows(band), phases[0]); }

    /// The pixel of a group's part of a panel where a row and a column of input that a chunk reads lie.
    int64_t place(int64_t row, int64_t column) const {
        const int64_t phase = row % phases[0] * phases[1] + column % phases[1];
        return (phase * phase_rows() + row / phases[0]) * panel_width + column / phases[1];
    }

    /// Numbers of a group's part of a panel.
    int64_t group_panel() const {
        return (flat ? band : phases[0] * phases[1] * phase_rows() * panel_width) * pitch;
    }

    /// Numbers of a row before its groups are put apart.
    int64_t spare() const { return grouped() ? panel_width * step.channels : 0; }

    /// Numbers of the weights of a register of output channels, and of all.
    int64_t tile_size() const { return int64_t(segments.size()) * depth * SIDE; }
    int64_t size() const { return step.groups * tiles * tile_size(); }

    /// The bytes of weights that a thread begins with.
    std::pair<int64_t, int64_t> first_weights(int thread, int threads) const {
        const int64_t all = 2 * size(), begin = many ? all * thread / threads / 64 * 64 : 0;
        return {begin, std::min(begin + MOST_ASKED, many ? all * (thread + 1) / threads : all)};
    }

    int64_t chunks() const { return images * bands * blocks; }

    Chunk chunk(int64_t number) const {
        if (many) return {number / bands % images, number % bands, number / (bands * images)};
        return {number / (bands * blocks), number / blocks % bands, number % blocks};
    }

    /// The groups of a chunk, and the registers of output channels of each.
    int64_t first_group(const Chunk& chunk) const { return grouped() ? chunk.block * block : 0; }
    int64_t groups(const Chunk& chunk) const {
        return grouped() ? std::min(block, step.groups - chunk.block * block) : 1;
    }
    int64_t first_tile(const Chunk& chunk) const { return grouped() ? 0 : 2 * chunk.block * block; }
    int64_t end_tile(const Chunk& chunk) const {
        return grouped() ? tiles : std::min(tiles, 2 * (chunk.block + 1) * block);
    }
};

}  // namespace

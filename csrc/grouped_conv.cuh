// What the convolutions' kernels share: activations, the taps that reach a pixel from behind, pixels of a map in shared
// memory, and products over taps.
//
// A pixel's channels are 16-byte chunks of eight elements. Pixels lie PITCH bytes apart, an odd number of chunks, so that
// the eight rows of a matrix, eight pixels beside each other, are in different banks.
#pragma once

#include <primitives.cuh>

constexpr DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr DEVICE int odd_pitch(int chunks) { return (chunks | 1) * 16; }

DEVICE float from_0_to_6(float x) { return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x; }

template <int ACTIVATION>
DEVICE float activate(float x) {
    static_assert(ACTIVATION >= NONE && ACTIVATION <= HARDSIGMOID, "no such activation");
    if constexpr (ACTIVATION == RELU) return x < 0.0f ? 0.0f : x;
    if constexpr (ACTIVATION == SILU) return x * sigmoid(x);
    if constexpr (ACTIVATION == RELU6) return from_0_to_6(x);
    if constexpr (ACTIVATION == HARDSWISH) return x * (from_0_to_6(x + 3.0f) * (1.0f / 6.0f));
    if constexpr (ACTIVATION == SIGMOID) return sigmoid(x);
    if constexpr (ACTIVATION == HARDSIGMOID) return from_0_to_6(x + 3.0f) * (1.0f / 6.0f);
    return x;
}

// activation(low) and activation(high), rounded.
template <class T, int ACTIVATION>
DEVICE unsigned narrow_activated(float low, float high) {
    if constexpr (ACTIVATION == RELU) return narrow_relu<T>(low, high);
    return narrow<T>(activate<ACTIVATION>(low), activate<ACTIVATION>(high));
}

template <int N>
struct Constant {
    static constexpr int value = N;
};

// Backwards with a stride, pixels of x fall into classes by their remainders: row % STRIDE * STRIDE + column % STRIDE.
// Each class has taps of its own; here are all taps in the order of the classes.
template <int STRIDE>
struct Classes {
    static constexpr int COUNT = STRIDE * STRIDE;

    static constexpr DEVICE int first(int which) { return which == 3 ? 5 : which == 2 ? 3 : which; }
    static constexpr DEVICE int taps(int which) { return STRIDE == 1 ? 9 : which == 3 ? 4 : which == 0 ? 1 : 2; }
    static constexpr DEVICE int tap(int place) { return STRIDE == 1 ? place : 0x862071534LL >> 4 * place & 15; }
    // From a pixel's own row or column of dy, which is the halo's with stride 2 and one further with stride 1.
    static constexpr DEVICE int shift(int k) { return STRIDE == 1 ? 2 - k : k == 0; }
};

template <int ACTIVATION>
DEVICE float slope(float z) {
    static_assert(ACTIVATION == NONE || ACTIVATION == RELU || ACTIVATION == SILU, "no such activation");
    if constexpr (ACTIVATION == RELU) return z > 0.0f ? 1.0f : 0.0f;
    if constexpr (ACTIVATION == SILU) {
        float s = sigmoid(z);
        return s * (1.0f + z * (1.0f - s));
    }
    return 1.0f;
}

DEVICE Floats2 affine(Floats2 value, Floats2 factor, Floats2 summand) {
    return {value.x * factor.x + summand.x, value.y * factor.y + summand.y};
}

template <class Index>
DEVICE Floats2 load_two(const float* of, Index channel) {
    return load_global(reinterpret_cast<const Floats2*>(of + channel));
}

// What eight channels have, in pairs.
struct Pairs {
    Floats2 of[4];

    DEVICE Pairs(const float* values, int first) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Floats4 four = load_global(reinterpret_cast<const Floats4*>(values + first) + i);
            of[2 * i] = {four.x, four.y}, of[2 * i + 1] = {four.z, four.w};
        }
    }
};

// A chunk in shared memory as activation(chunk * scale + shift), of the channels from `first` on.
template <class T, int ACTIVATION>
DEVICE void read_through(unsigned at, const float* scale, const float* shift, int first) {
    Eight value = load_shared<Eight>(at);
    const Pairs factor(scale, first), summand(shift, first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        Floats2 z = affine(widen<T>(value.pair[i]), factor.of[i], summand.of[i]);
        value.pair[i] = narrow_activated<T, ACTIVATION>(z.x, z.y);
    }
    store_shared(at, value);
}

// ROWS x COLUMNS pixels of CHUNKS chunks. With ALTERNATE even columns come first in each row and odd ones after them: the
// pixels under one tap of a convolution with stride 2 are then beside each other.
template <int ROWS, int COLUMNS, int CHUNKS, bool ALTERNATE = false>
struct Tile {
    static constexpr int HEIGHT = ROWS, WIDTH = COLUMNS, PIXELS = ROWS * COLUMNS;
    static constexpr int PITCH = odd_pitch(CHUNKS), BYTES = PIXELS * PITCH;

    static constexpr DEVICE int offset(int row, int column) {
        int place = ALTERNATE ? column / 2 + column % 2 * ((COLUMNS + 1) / 2) : column;
        return (row * COLUMNS + place) * PITCH;
    }

    static constexpr DEVICE int row(int place) { return place / COLUMNS; }
    static constexpr DEVICE int column(int place) {
        int at = place % COLUMNS, even = (COLUMNS + 1) / 2;
        return !ALTERNATE ? at : at < even ? 2 * at : 2 * (at - even) + 1;
    }
};

// A block's walk over its share of all tiles, one after another: the image, and row and column of tiles. Only its first
// step divides.
struct Walk {
    int down, across, count, first, image, row, column;

    DEVICE Walk(int images, int down, int across) : down(down), across(across) {
        const int tiles = images * down * across, least = tiles / grid_x(), more = tiles % grid_x();
        count = least + (block_x() < more);
        first = block_x() * least + (block_x() < more ? block_x() : more);
        image = first / (down * across), row = first / across % down, column = first % across;
    }

    // Bits for the edges of the image that the tile is at: above, below, left, right.
    DEVICE unsigned edges() const {
        return (row == 0) | (row == down - 1) << 1 | (column == 0) << 2 | (column == across - 1) << 3;
    }

    DEVICE void advance() {
        if (++column == across) column = 0, ++row;
        if (row == down) row = 0, ++image;
    }
};

template <bool WIDE>
struct Word {
    using Type = unsigned;
};
template <>
struct Word<true> {
    using Type = unsigned long long;
};

// Which of COUNT pixels of a tile are in the image, as bits: those that are known, without what lies outside in the first
// and last row and column of tiles. It is the same for all tiles between.
template <int COUNT>
struct Edges {
    static_assert(COUNT <= 32, "bits of a word");
    static constexpr int HALF = COUNT > 16 ? 32 : 16;
    using Two = typename Word<(COUNT > 16)>::Type;
    unsigned known = 0;
    Two rows = 0, columns = 0;  // outside in the first and, from HALF on, in the last

    // Of the pixel at (row, column) from a tile's first own one; the last tiles have so many of the image's.
    DEVICE void add(int i, bool is_known, int row, int column, int last_rows, int last_columns) {
        known |= unsigned(is_known) << i;
        rows |= Two(row < 0) << i | Two(row >= last_rows) << (HALF + i);
        columns |= Two(column < 0) << i | Two(column >= last_columns) << (HALF + i);
    }

    DEVICE unsigned inside(bool first_row, bool last_row, bool first_column, bool last_column) const {
        unsigned outside = first_row ? unsigned(rows) : 0;
        if (first_column) outside |= unsigned(columns);
        if (last_row) outside |= unsigned(rows >> HALF);
        if (last_column) outside |= unsigned(columns >> HALF);
        return known & ~outside;
    }

    DEVICE unsigned inside(const Walk& at) const {
        return inside(at.row == 0, at.row == at.down - 1, at.column == 0, at.column == at.across - 1);
    }

    // In a tile with such `Walk::edges`.
    DEVICE unsigned inside(unsigned edges) const { return inside(edges & 1, edges & 2, edges & 4, edges & 8); }
};

// A thread's share of the copies of each tile: chunks thread_x() + i THREADS in the order of shared memory, with those
// that lie between pixels. The tile begins BEFORE rows and columns before its first own pixel. With HOLD their places are
// kept in registers, else found again for each tile.
template <class Tile, int BEFORE, int THREADS, bool HOLD>
struct Share {
    static constexpr int CHUNKS = Tile::BYTES / 16, OF_PIXEL = Tile::PITCH / 16, COUNT = ceil_div(CHUNKS, THREADS);
    int columns, channels;
    unsigned held[HOLD ? COUNT : 1];
    Edges<COUNT> edges;

    // Of `columns` x any pixels of so many channels, `known` chunks of each; the last tiles have last_rows, last_columns.
    DEVICE Share(int columns, int channels, int known, int last_rows, int last_columns)
        : columns(columns), channels(channels) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            int at = thread_x() + i * THREADS, place = at / OF_PIXEL;
            int row = Tile::row(place) - BEFORE, column = Tile::column(place) - BEFORE;
            edges.add(i, at < CHUNKS && at % OF_PIXEL < known, row, column, last_rows, last_columns);
            if (HOLD) held[i] = from(thread_x(), i);
        }
    }

    // Bytes from the tile's first pixel on, which may lie outside the image.
    DEVICE unsigned from(int thread, int i) const {
        int at = thread + i * THREADS, place = at / OF_PIXEL;
        return ((Tile::row(place) * columns + Tile::column(place)) * channels + at % OF_PIXEL * 8) * 2u;
    }

    // Which are of the first `count` chunks of a pixel.
    static DEVICE unsigned chunks(int count) {
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) bits |= unsigned((thread_x() + i * THREADS) % OF_PIXEL < count) << i;
        return bits;
    }

    // Copies what is inside of a tile whose first pixel is at `map`, and zeros for what is not.
    template <class T>
    DEVICE void copy(unsigned address, const T* map, unsigned inside) const {
        const char* first = reinterpret_cast<const char*>(map);
        const int thread = HOLD ? thread_x() : forget(thread_x());
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if ((i + 1) * THREADS <= CHUNKS || thread_x() + i * THREADS < CHUNKS)
                copy_async(
                    address + (thread_x() + i * THREADS) * 16, first + (HOLD ? held[i] : from(thread, i)),
                    inside & 1u << i);
    }

    // Visits what this thread has copied of a tile: (chunk of the pixel, address).
    template <class Visit>
    static DEVICE void visit(unsigned address, unsigned inside, Visit visit) {
#pragma unroll 1
        for (int i = 0; i < COUNT; ++i) {
            int at = thread_x() + i * THREADS;
            if (inside >> i & 1) visit(at % OF_PIXEL, address + at * 16);
        }
    }
};

// The order of a sum's terms, 9 taps of CHUNKS chunks: two of one product are a row of taps apart, or a tap, or a chunk.
// So few different distances need few registers.
template <int CHUNKS>
struct Terms {
    static constexpr DEVICE int tap(int k) {
        return k < 6 * CHUNKS ? k % 2 * 3 + k / 2 / CHUNKS : k < 8 * CHUNKS ? 6 + k % 2 : 8;
    }
    static constexpr DEVICE int chunk(int k) {
        return k < 6 * CHUNKS ? k / 2 % CHUNKS : k < 8 * CHUNKS ? k / 2 - 3 * CHUNKS : k - 8 * CHUNKS;
    }
};

// A thread's share of the copies of ROWS rows of weights, DEPTH chunks of each: the same term of some rows.
template <int ROWS, int DEPTH, int WIDTH, int THREADS, bool UNROLLED>
struct WeightShare {
    static constexpr int AT_ONCE = THREADS / DEPTH;
    int row, known_rows, channel;
    unsigned from, to;  // elements of the weight, bytes of shared memory

    // From the row `first` on, of which there are known_rows; tap and channel are those of term thread_x() % DEPTH.
    DEVICE WeightShare(int first, int known_rows, int tap, int channel)
        : row(thread_x() / DEPTH),
          known_rows(known_rows),
          channel(channel),
          from((first + row) * (9 * WIDTH) + tap * WIDTH + channel),
          to(row * odd_pitch(DEPTH) + thread_x() % DEPTH * 16) {}

    template <class T>
    DEVICE void copy(unsigned address, const T* weight, int first_channel) const {
        if (row >= AT_ONCE) return;
#pragma unroll(UNROLLED ? 16 : 1)
        for (int i = 0; i < ROWS; i += AT_ONCE)
            if (row + i < ROWS)
                copy_async(
                    address + to + i * odd_pitch(DEPTH), weight + (from + first_channel + i * (9 * WIDTH)),
                    row + i < known_rows && channel + first_channel < WIDTH);
    }
};

// sums[j][n] += rows of pixels x columns of weights, over DEPTH chunks.
//
//   pixels[j]  address of the first chunk of pixel lane % 16 of the j-th sixteen
//   taps(k)    from there to the k-th chunk of the sum
//   weights    address of the first chunk of the first output channel; channels lie odd_pitch(PITCH_CHUNKS) apart
template <class T, int DEPTH, int SIXTEENS, int EIGHTS, int PITCH_CHUNKS, class Taps>
DEVICE void multiply(
    float (&sums)[SIXTEENS][EIGHTS][4], const unsigned (&pixels)[SIXTEENS], unsigned weights, Taps taps) {
    constexpr int PITCH = odd_pitch(PITCH_CHUNKS);
    int lane = thread_x() % 32;
    bool second = lane >= 16;
    unsigned column = weights + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k + 1 < DEPTH; k += 2) {
        if (k % 16 == 14) hold_loads();
        int further = second ? taps(k + 1) - taps(k) : 0;
        unsigned b[EIGHTS][2];
#pragma unroll
        for (int n = 0; n + 1 < EIGHTS; n += 2) {
            unsigned four[4];
            load_matrices(four, column + n * 8 * PITCH + k * 16);
            b[n][0] = four[0], b[n][1] = four[1], b[n + 1][0] = four[2], b[n + 1][1] = four[3];
        }
        if constexpr (EIGHTS % 2) load_matrices(b[EIGHTS - 1], column + (EIGHTS - 1) * 8 * PITCH + k * 16);
#pragma unroll
        for (int j = 0; j < SIXTEENS; ++j) {
            unsigned a[4];
            load_matrices(a, pixels[j] + further + taps(k));
#pragma unroll
            for (int n = 0; n < EIGHTS; ++n) mma_k16<T>(sums[j][n], a, b[n]);
        }
    }
    if constexpr (DEPTH % 2) {
        unsigned b[EIGHTS][1];
#pragma unroll
        for (int n = 0; n < EIGHTS; ++n)
            load_matrices(b[n], column + n * 8 * PITCH + (DEPTH - 1) * 16);  // of the first eight lanes
#pragma unroll
        for (int j = 0; j < SIXTEENS; ++j) {
            unsigned a[2];
            load_matrices(a, pixels[j] + taps(DEPTH - 1));
#pragma unroll
            for (int n = 0; n < EIGHTS; ++n) mma_k8<T>(sums[j][n], a, b[n]);
        }
    }
}

// What the convolutions' kernels share: activations, the taps that reach a pixel from behind, pixels of a map in shared
// memory, and products over taps.
//
// A pixel's channels are 16-byte chunks of eight elements. Pixels lie PITCH bytes apart, an odd number of chunks, so that
// the eight rows of a matrix, eight pixels beside each other, are in different banks.
#pragma once

#include <primitives.cuh>

constexpr DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr DEVICE int odd_pitch(int chunks) { return (chunks | 1) * 16; }

template <int ACTIVATION>
DEVICE float activate(float x) {
    static_assert(ACTIVATION == NONE || ACTIVATION == RELU || ACTIVATION == SILU, "no such activation");
    if constexpr (ACTIVATION == RELU) return x < 0.0f ? 0.0f : x;
    if constexpr (ACTIVATION == SILU) return x * sigmoid(x);
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

DEVICE Floats2 load_two(const float* of, int channel) { return load_global(reinterpret_cast<const Floats2*>(of + channel)); }

// A chunk in shared memory as activation(chunk * scale + shift), of the channels from `first` on.
template <class T, int ACTIVATION>
DEVICE void read_through(unsigned at, const float* scale, const float* shift, int first) {
    Eight value = load_shared<Eight>(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        Floats2 z = affine(widen<T>(value.pair[i]), load_two(scale, first + 2 * i), load_two(shift, first + 2 * i));
        value.pair[i] = narrow<T>(activate<ACTIVATION>(z.x), activate<ACTIVATION>(z.y));
    }
    store_shared(at, value);
}

// ROWS x COLUMNS pixels of CHUNKS chunks. With ALTERNATE even columns come first in each row and odd ones after them: the
// pixels under one tap of a convolution with stride 2 are then beside each other.
template <int ROWS, int COLUMNS, int CHUNKS, bool ALTERNATE = false>
struct Tile {
    static constexpr int PITCH = odd_pitch(CHUNKS);
    static constexpr int BYTES = ROWS * COLUMNS * PITCH;

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

// A block's walk over the tiles block_x() + i grid_x(): the image, and row and column of tiles. Only its first step
// divides.
struct Walk {
    int down, across, image, row, column, images_on, rows_on, columns_on;

    DEVICE Walk(int down, int across)
        : down(down),
          across(across),
          image(block_x() / (down * across)),
          row(block_x() / across % down),
          column(block_x() % across),
          images_on(grid_x() / (down * across)),
          rows_on(grid_x() / across % down),
          columns_on(grid_x() % across) {}

    DEVICE void advance() {
        image += images_on, row += rows_on, column += columns_on;
        if (column >= across) column -= across, ++row;
        if (row >= down) row -= down, ++image;
    }
};

// Which of up to 32 pixels of a tile are in the image, as bits: what the first and last row and column of tiles have of
// those that are known. It is the same for all tiles between. AROUND: pixels before a tile's first belong to it.
template <bool AROUND>
struct Edges {
    unsigned known = 0, top = 0, left = 0, bottom = 0, right = 0;

    // Of the pixel at (row, column) from a tile's first one; the last tiles have `rows` and `columns` of the image.
    DEVICE void add(int i, bool is_known, int row, int column, int rows, int columns) {
        unsigned bit = unsigned(is_known) << i;
        known |= bit;
        if (row >= 0) top |= bit;
        if (column >= 0) left |= bit;
        if (row < rows) bottom |= bit;
        if (column < columns) right |= bit;
    }

    DEVICE unsigned inside(const Walk& at) const {
        unsigned bits = known;
        if (AROUND && at.row == 0) bits &= top;
        if (AROUND && at.column == 0) bits &= left;
        if (at.row == at.down - 1) bits &= bottom;
        if (at.column == at.across - 1) bits &= right;
        return bits;
    }
};

// A thread's share of the copies of each tile: chunks thread_x() + i THREADS in the order of shared memory, with those
// that lie between pixels. The tile begins BEFORE rows and columns before its first own pixel.
template <class Tile, int BEFORE, int THREADS>
struct Share {
    static constexpr int CHUNKS = Tile::BYTES / 16, OF_PIXEL = Tile::PITCH / 16, COUNT = ceil_div(CHUNKS, THREADS);
    static_assert(COUNT <= 32, "bits of a word");
    unsigned from[COUNT];  // bytes from the tile's first pixel on, which may lie outside
    Edges<BEFORE != 0> edges;

    // Of `columns` x any pixels of so many channels, `known` chunks of each; the last tiles have last_rows, last_columns.
    DEVICE Share(int columns, int channels, int known, int last_rows, int last_columns) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            int at = thread_x() + i * THREADS, place = at / OF_PIXEL, chunk = at % OF_PIXEL;
            int row = Tile::row(place), column = Tile::column(place);
            from[i] = ((row * columns + column) * channels + chunk * 8) * 2u;
            edges.add(i, at < CHUNKS && chunk < known, row - BEFORE, column - BEFORE, last_rows, last_columns);
        }
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
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if ((i + 1) * THREADS <= CHUNKS || thread_x() + i * THREADS < CHUNKS)
                copy_async(address + (thread_x() + i * THREADS) * 16, first + from[i], inside & 1u << i);
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
            load_matrices(b[n], weights + (n * 8 + lane % 8) * PITCH + (DEPTH - 1) * 16);
#pragma unroll
        for (int j = 0; j < SIXTEENS; ++j) {
            unsigned a[2];
            load_matrices(a, pixels[j] + taps(DEPTH - 1));
#pragma unroll
            for (int n = 0; n < EIGHTS; ++n) mma_k8<T>(sums[j][n], a, b[n]);
        }
    }
}

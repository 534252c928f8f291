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

    // Visits the chunks that are this thread's: (row, column, chunk, address).
    template <int THREADS, class Visit>
    static DEVICE void visit(unsigned address, Visit visit) {
#pragma unroll 1
        for (int i = thread_x(); i < ROWS * COLUMNS * CHUNKS; i += THREADS) {
            int pixel = i / CHUNKS, chunk = i % CHUNKS, row = pixel / COLUMNS, column = pixel % COLUMNS;
            visit(row, column, chunk, address + offset(row, column) + chunk * 16);
        }
    }

    // Copies the pixels from (top, left) of an image on, `known` chunks of each; the rest, and what lies outside the
    // image, is zero. `map` points to the first of these channels in the image's first pixel.
    template <int THREADS, class T>
    static DEVICE void copy(
        unsigned address, const T* map, int top, int left, int height, int columns, int channels, int known) {
        visit<THREADS>(address, [&](int row, int column, int chunk, unsigned to) {
            int h = top + row, w = left + column;
            bool inside = h >= 0 && h < height && w >= 0 && w < columns && chunk < known;
            copy_async(to, inside ? map + (h * columns + w) * channels + chunk * 8 : map, inside);
        });
    }
};

// A tile's place: the image, and its first row and column.
struct Place {
    int image, top, left;

    DEVICE Place(int tile, int down, int across, int rows, int columns)
        : image(tile / (down * across)),
          top(tile / across % down * rows),
          left(tile % across * columns) {}
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
        int further = second ? taps(k + 1) - taps(k) : 0;  // few different ones: few registers
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
